# ruff: noqa: E501
"""What the documents of `make_documents` say: texts written for this project, about things that are so."""

LIGHTHOUSES = {
    "title": "Lighthouses and Their Lights",
    "lead": (
        "A lighthouse marks a dangerous coast or the way into a harbour. For most of history the difficulty was not the "
        "tower but the lamp: a fire of wood or coal could be seen only a few miles out, and in rain hardly at all. This "
        "report compares four well known towers and explains how their lights became visible from beyond the horizon."
    ),
    "table": [
        ["Lighthouse", "Country", "First lit", "Height in metres"],
        ["Pharos of Alexandria", "Egypt", "about 280 BC", "over 100"],
        ["Tower of Hercules", "Spain", "2nd century", "55"],
        ["Eddystone (Smeaton)", "England", "1759", "22"],
        ["Cordouan", "France", "1611", "68"],
    ],
    "figure": ["Range of lights", "open fire: 5 miles", "Fresnel lens: 20 miles"],
    "caption": "Figure 1: How far a light could be seen before and after the Fresnel lens.",
    "sections": [
        (
            "The Fresnel lens",
            [
                "In 1822 the French physicist Augustin-Jean Fresnel showed a lens made of rings of glass prisms. A solid "
                "lens of the same power would have been too thick and too heavy for any tower; the rings keep only the "
                "curved surface, which does the bending, and leave out the glass behind it.",
                "The first such lens was lit on the tower of Cordouan, at the mouth of the Gironde estuary, in 1823. Its "
                "beam was seen more than thirty kilometres away. Within a few decades most important lights of Europe "
                "and North America had changed to the new lenses.",
                "Fresnel sorted his lenses into orders by their focal length. A first-order lens stands more than two "
                "and a half metres tall and was meant for the open sea, while a sixth-order lens fits on a table and "
                "was used in harbours and on piers.",
            ],
        ),
        (
            "Building on rock",
            [
                "The reef of Eddystone lies fourteen kilometres off Cornwall. Four towers have stood on it. The first, "
                "built of wood by Henry Winstanley, was swept away together with its builder in the Great Storm of "
                "November 1703.",
                "John Smeaton, who built the third tower, shaped it like the trunk of an oak: wide at its foot, narrow "
                "above. He joined the granite blocks by dovetails, and used a lime mortar that sets under water. "
                "Engineers regard this mortar as the ancestor of modern cement.",
                "Smeaton's tower stood for more than a century. It was taken down in the 1880s because the rock beneath "
                "it was being worn away by the sea, not because the tower had failed. Its upper part was built up again "
                "on Plymouth Hoe, where it can be visited.",
            ],
        ),
        (
            "Telling lights apart",
            [
                "A sailor must know which light is seen. Each lighthouse therefore has a character of its own: a number "
                "of flashes, a colour, and a period after which the pattern begins again. The character is printed on "
                "sea charts and in the list of lights.",
                "Lenses that weigh several tonnes used to float in a bath of mercury, so that a clockwork driven by a "
                "falling weight could turn them. The keeper wound the weight up every few hours.",
            ],
        ),
    ],
    "list": [
        "Light the lamp at sunset and put it out at sunrise.",
        "Trim the wick every four hours so that the flame did not smoke.",
        "Wind the clockwork that turned the lens.",
        "Write the weather and the passing ships into the log.",
    ],
}

PENGUINS = [
    (
        "Emperor Penguins",
        [
            "The emperor penguin is the tallest and heaviest of all living penguins. Adults stand about one metre tall "
            "and weigh between 22 and 45 kilograms.",
            "It is the only penguin that breeds during the Antarctic winter. The female lays one egg and then walks back "
            "to the sea to feed, while the male keeps the egg on his feet under a fold of skin for about 65 days.",
        ],
    ),
    (
        "Diving and Warmth",
        [
            "Emperor penguins hunt fish, krill and squid. They can dive deeper than 500 metres, and the longest dive that "
            "was measured lasted more than 30 minutes.",
            "On land they huddle in large groups. Birds at the edge move slowly inward, so that each one spends some time "
            "in the warm middle.",
        ],
    ),
]

RHINE = {
    "title": "The Rhine from the Alps to the Sea",
    "sections": [
        (
            "Course",
            1,
            [
                "The Rhine rises in the Swiss Alps and reaches the North Sea in the Netherlands after about 1,230 "
                "kilometres. On its way it touches Switzerland, Liechtenstein, Austria, Germany, France and the "
                "Netherlands.",
                "Two headwaters, the Vorderrhein and the Hinterrhein, meet at Reichenau near Chur. The Vorderrhein comes "
                "from Lake Toma, which is usually called the source of the river.",
            ],
        ),
        (
            "Lake Constance",
            2,
            [
                "Between Switzerland, Germany and Austria the river flows through Lake Constance. The water leaves the "
                "lake clearer than it came, because gravel and mud sink to the bottom on the way.",
            ],
        ),
        (
            "The falls at Schaffhausen",
            2,
            [
                "Near Schaffhausen the river drops 23 metres over a width of 150 metres. The Rhine Falls were formed in "
                "the last ice age, when the river was pushed into a new bed over hard limestone.",
            ],
        ),
        (
            "Navigation",
            1,
            [
                "Large barges sail upstream as far as Basel. The Convention of Mannheim of 1868 guarantees free passage "
                "on the river, and the commission that watches over it, founded in 1815, is the oldest international "
                "organisation that still works.",
                "In the nineteenth century the engineer Johann Gottfried Tulla straightened the Upper Rhine. The work "
                "shortened the stretch between Basel and Bingen by 81 kilometres, drained malaria swamps, and made the "
                "water flow faster, so that floods now reach the cities downstream sooner.",
            ],
        ),
    ],
    "list": [
        "Basel: end of the waterway for large ships.",
        "Strasbourg: seat of the commission for navigation on the Rhine.",
        "Cologne: the cathedral stands 250 metres from the bank.",
        "Rotterdam: the largest port of Europe, at the mouth.",
    ],
    "table": [
        ["Tributary", "Length in km", "Meets the Rhine at"],
        ["Aare", "288", "Koblenz (Switzerland)"],
        ["Neckar", "362", "Mannheim"],
        ["Main", "525", "Mainz"],
        ["Moselle", "544", "Koblenz (Germany)"],
    ],
    "figure": ["Rhine Falls", "height 23 m", "width 150 m"],
    "caption": "Figure 1: Size of the Rhine Falls.",
    "end": (
        "The river carries about 2,300 cubic metres of water a second at its mouth. In dry summers, such as those of 2018 "
        "and 2022, barges could load only a part of their usual freight at Kaub, where the channel is shallowest."
    ),
}

SLIDES = {
    "slides": [
        (
            "Where coffee comes from",
            [
                "The coffee plant grew wild in the forests of Ethiopia",
                "Yemen was the first country to grow it for trade, in the 15th century",
                "Arabica and robusta are the two species that matter in trade",
            ],
            "Remind the audience that the port of Mocha in Yemen gave its name to a kind of coffee.",
        ),
        (
            "From cherry to bean",
            [
                "A coffee cherry usually holds two seeds, the beans",
                "Washed beans are fermented in water to loosen the fruit",
                "Roasting at about 200 degrees Celsius makes the aroma",
            ],
            "A cherry with a single round seed is called a peaberry.",
        ),
        (
            "Coffee houses",
            [
                "Coffee houses opened in Constantinople in the 1550s",
                "The insurance market Lloyd's of London began in Edward Lloyd's coffee house",
                "Johann Sebastian Bach wrote a Coffee Cantata",
            ],
            "Lloyd's coffee house stood in Tower Street and moved to Lombard Street in 1691.",
        ),
    ],
    "table_title": "Two species",
    "table": [
        ["Species", "Share of the harvest", "Caffeine"],
        ["Arabica", "about 55 percent", "1.2 percent"],
        ["Robusta", "about 45 percent", "2.2 percent"],
    ],
    "figure_title": "A strong espresso",
    "figure": ["Espresso", "9 bar pressure", "25 to 30 seconds"],
}

COMET = {
    "title": "Halley's Comet",
    "before": "Reading time: four minutes.",
    "sections": [
        (
            "A comet that comes back",
            [
                "Edmond Halley noticed that the comets of 1531, 1607 and 1682 had followed almost the same path. He "
                "concluded that they were one body, and foretold its return for about 1758.",
                "The comet was sighted on Christmas night of 1758 by Johann Georg Palitzsch, a farmer near Dresden who "
                "studied astronomy by himself. Halley had died sixteen years before.",
            ],
        ),
        (
            "What it is made of",
            [
                "The nucleus is about fifteen kilometres long and eight kilometres wide. It is one of the darkest bodies "
                "in the solar system and reflects only four percent of the light that falls on it.",
                "In March 1986 the European probe Giotto passed the nucleus at a distance of 596 kilometres and sent the "
                "first close pictures of it. They showed jets of gas and dust that broke out of the side facing the "
                "Sun.",
            ],
        ),
        (
            "Shooting stars",
            [
                "Dust from the comet falls into the atmosphere of the Earth twice a year. It causes the Eta Aquariids in "
                "May and the Orionids in October.",
            ],
        ),
    ],
    "caption": "Poster with the years of the comet's returns.",
    "table": [
        ["Year", "What was recorded"],
        ["240 BC", "the first sure record, in the Chinese chronicle Shiji"],
        ["1066", "shown on the Bayeux Tapestry"],
        ["1910", "the Earth passed through the tail"],
        ["1986", "visited by five space probes"],
    ],
}

VIOLIN = {
    "title": "The Violin",
    "lead": (
        "The violin took its present form in northern Italy in the first half of the *sixteenth* century. Andrea Amati of "
        "Cremona is the earliest maker whose instruments have survived."
    ),
    "caption": "The open strings of the violin",
    "sections": [
        (
            "How the sound is made",
            [
                "The bow, strung with horse hair rubbed with rosin, grips the string and lets it go some hundreds of "
                "times a second. The bridge carries the movement into the belly of the instrument, which is made of "
                "spruce.",
                "A small wooden dowel stands inside, under the treble foot of the bridge. It links the belly with the "
                "back, which is made of maple. Italian makers call it *anima*, the soul; in English it is the sound "
                "post.",
            ],
        ),
        (
            "Makers of Cremona",
            [
                "Antonio Stradivari worked in Cremona until his death in 1737 and made more than a thousand "
                "instruments. About 650 of them survive, most of them violins.",
                "Giuseppe Guarneri, called del Gesù, made far fewer. Niccolò Paganini owned one of his violins from 1743 "
                "and named it *Il Cannone*, the cannon, for its loud tone. He left it to the city of Genoa.",
            ],
        ),
    ],
    "table": [
        ["String", "Pitch", "Frequency in hertz"],
        ["Lowest", "G3", "196"],
        ["Second", "D4", "293.7"],
        ["Third", "A4", "440"],
        ["Highest", "E5", "659.3"],
    ],
    "list": [
        "Wipe the rosin dust off the strings after playing.",
        "Loosen the hair of the bow before it is put away.",
        "Keep the humidity between 40 and 60 percent.",
    ],
}

PLANETS = [
    ["Planet", "Diameter in km", "Moons", "Year in days"],
    ["Mercury", 4879, 0, 88],
    ["Venus", 12104, 0, 224.7],
    ["Earth", 12756, 1, 365.2],
    ["Mars", 6792, 2, 687],
    ["Jupiter", 142984, 95, 4331],
    ["Saturn", 120536, 146, 10747],
    ["Uranus", 51118, 28, 30589],
    ["Neptune", 49528, 16, 59800],
]

RIVERS = [
    ["River", "Length in km", "Flows into"],
    ["Nile", 6650, "Mediterranean Sea"],
    ["Amazon", 6400, "Atlantic Ocean"],
    ["Yangtze", 6300, "East China Sea"],
    ["Danube", 2850, "Black Sea"],
    ["Rhine", 1230, "North Sea"],
]

CHINESE = """长城

长城是中国古代修建的防御工程。现存的城墙大多建于明朝,西起嘉峪关,东到辽宁的虎山。二〇一二年公布的调查结果表明,历代长城总长约为二万一千一百九十六千米。

修建的材料

修建长城时多就地取材。山区用石块,平原用夯土,沙漠里用红柳枝和芦苇一层一层铺上沙石。明代的砖墙用石灰浆砌成,工匠在石灰浆里加入糯米汤,使它更加牢固。

烽火台

烽火台用来传递军情。白天点烟,夜里举火。明朝规定:来敌百人左右,举一烟放一炮;五百人,举二烟放二炮;千人以上,举三烟放三炮。消息在几个小时内就能传到几百千米以外。

嘉峪关

嘉峪关建于一三七二年,是明长城西端的关口。传说工匠计算用砖十分准确,完工时只剩下一块砖,这块砖至今还放在城楼的后檐台上。
"""

LATIN = """El r\u00edo Amazonas

El Amazonas nace en los Andes del Per\u00fa y desemboca en el oc\u00e9ano Atl\u00e1ntico despu\u00e9s de unos 6.400 kil\u00f3metros. Es el r\u00edo m\u00e1s caudaloso del mundo: lleva cerca de una quinta parte del agua dulce que los r\u00edos de la Tierra vierten en el mar.

Francisco de Orellana fue el primer europeo que lo recorri\u00f3 entero, en 1541 y 1542. Cont\u00f3 que hab\u00eda luchado contra mujeres guerreras, y por ellas el r\u00edo recibi\u00f3 su nombre.

Ning\u00fan puente cruza el curso principal del Amazonas. En la \u00e9poca de lluvias el nivel del agua sube m\u00e1s de diez metros y los barcos navegan entre las copas de los \u00e1rboles.
"""
