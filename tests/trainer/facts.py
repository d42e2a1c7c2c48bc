"""Small true records for the training tests, and the JSONL files of each stage made of them."""

import json
from pathlib import Path

# Document, question, answer, the document in other words.
FACTS = [
    ("Marie Curie was born in Warsaw in 1867.", "Where was Marie Curie born?", "In Warsaw",
     "The birthplace of Marie Curie, in 1867, was Warsaw."),
    ("The Danube flows through ten countries.", "How many countries does the Danube cross?", "Ten",
     "Ten countries lie on the course of the Danube."),
    ("A violin has four strings.", "How many strings has a violin?", "Four", "There are four strings on a violin."),
    ("Penguins cannot fly, but they swim well.", "Can penguins fly?", "No",
     "Penguins swim well although they are unable to fly."),
    ("Canberra is the capital of Australia.", "What is the capital of Australia?", "Canberra",
     "The capital of Australia is called Canberra."),
    ("Water boils at 100 degrees Celsius at sea level.", "At what temperature does water boil at sea level?",
     "At 100 degrees Celsius", "At sea level 100 degrees Celsius are enough for water to boil."),
    ("Mount Everest is 8,849 metres high.", "How high is Mount Everest?", "8,849 metres",
     "The height of Mount Everest is 8,849 metres."),
    ("Vienna lies on the Danube.", "On which river does Vienna lie?", "The Danube", "The Danube runs past Vienna."),
    ("Honey bees have five eyes.", "How many eyes have honey bees?", "Five", "Five eyes belong to each honey bee."),
    ("Iceland has no army.", "Does Iceland have an army?", "No", "There is no army in Iceland."),
    ("The Moon orbits the Earth in 27 days.", "How long does the Moon need for an orbit?", "27 days",
     "Within 27 days the Moon goes once around the Earth."),
    ("Gold has the chemical symbol Au.", "Which symbol has gold?", "Au", "Au stands for gold in chemistry."),
    ("Finland joined the European Union in 1995.", "When did Finland join the European Union?", "In 1995",
     "In 1995 the European Union took in Finland."),
    ("The Sahara is the largest hot desert.", "Which hot desert is the largest?", "The Sahara",
     "No hot desert is larger than the Sahara."),
    ("An octopus has three hearts.", "How many hearts has an octopus?", "Three", "Three hearts beat in an octopus."),
    ("Lake Baikal is the deepest lake in the world.", "Which lake is the deepest?", "Lake Baikal",
     "No lake in the world is deeper than Lake Baikal."),
    ("Johann Sebastian Bach died in Leipzig in 1750.", "In which city did Bach die?", "In Leipzig",
     "In 1750 Johann Sebastian Bach died; it was in Leipzig."),
    ("Brazil is the largest country in South America.", "Which country of South America is the largest?", "Brazil",
     "No country of South America is larger than Brazil."),
    ("The heart of a blue whale weighs about 180 kilograms.", "How heavy is the heart of a blue whale?",
     "About 180 kilograms", "About 180 kilograms is what the heart of a blue whale weighs."),
    ("Sound travels faster in water than in air.", "Is sound faster in water or in air?", "In water",
     "In air sound is slower than it is in water."),
]  # fmt: skip
DOCS = [fact[0] for fact in FACTS]


def qa(i: int) -> dict:
    """A stage-1 QA set over fact i."""
    document, question, answer, _ = FACTS[i]
    return {"data_type": "qa", "question": [question], "answers": [answer], "docs": [document]}


def paraphrase(i: int) -> dict:
    """A stage-1 paraphrase of fact i."""
    document, _, _, words = FACTS[i]
    return {"data_type": "paraphrase", "question": "", "answers": [words], "docs": [document]}


def candidates(i: int, n: int = 4) -> dict:
    """A question with n documents; the one that answers it stands at position i % n."""
    docs = [DOCS[(i + 3 * j) % len(DOCS)] for j in range(1, n + 1)]
    docs[i % n] = DOCS[i]
    return {"question": FACTS[i][1], "docs": docs, "gold_answer": FACTS[i][2], "pos_index": [i % n]}


def records(stage: str, n: int = len(FACTS)) -> list[dict]:
    """The first n records of a stage; stage 1 alternates QA sets and paraphrases."""
    if stage == "stage1":
        return [paraphrase(i) if i % 3 == 2 else qa(i) for i in range(n)]
    return [candidates(i) for i in range(n)]


def write_jsonl(path: Path, lines: list) -> Path:
    """Writes one JSON value a line."""
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path
