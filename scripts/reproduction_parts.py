"""How much of the small model's plan is run: sizes, shares and learning rates of the parts of reproduce_small.py."""

from dataclasses import dataclass

FULL = "full"  # the run over texts that fill a document, and the ending of its files, one of each kind
KINDS = "stage1", "openings", "words", "follow"
DECAY, NO_DROPOUT = ("--span_decay", "0.5"), ("--lora_dropout", "0")


@dataclass(frozen=True)
class Run:
    """Size of a training run; `samples` are records of one epoch."""

    samples: int
    batch: int
    lr: float
    epochs: int = 1


@dataclass(frozen=True)
class Further:
    """A run with which stage 1 goes on. `shares` are of QA sets, of openings, of words in no order and of sets of
    questions which words follow, as many as there are. The first `passages` and `openings`, and of both the others
    the first `made`, were used before it; `long` takes passages that are not short."""

    run: Run
    shares: str
    passages: int = 0
    openings: int = 0
    flags: tuple[str, ...] = ()
    long: bool = False
    made: int = 0

    def files(self, which: str) -> dict[str, str]:
        """Names of its data by kind, as many as it has shares."""
        own = f"_{which}" if self.made else ""
        names = {"stage1": f"_{which}", "openings": f"_{which}", "words": own, "follow": own}
        return {kind: f"{kind}{names[kind]}.jsonl" for kind in list(names)[: len(self.shares.split(","))]}


@dataclass(frozen=True)
class Again:
    """Stage 1 and stage 1_2 once more, over texts that fill a document, with `single` questions over one passage for
    each over several."""

    stage1: Further
    stage1_2: Run
    single: int


@dataclass(frozen=True)
class Part:
    """How much is run; documents longer than `doc_max_length` are left out of stage 1, and cut elsewhere. For each
    question over several documents, stage 1_2 has `single` over one, a passage of at most `short` tokens. Stage 1 goes
    on with the runs of `further`, over such passages or longer ones. Stage 2 asks over the candidates of `corpus`
    questions (0: each over its own), and is also started from a query reasoner that `retrieval` trained on labels.
    `again` goes on from there with the generator alone."""

    doc_max_length: int
    single: int
    rates: tuple[int, ...]
    warm_up: Run
    stage1: Run
    stage1_2: Run
    stage2: Run
    retrieval: Run | None
    text_rag: Run
    ablation: Run | None
    further: dict[str, Further]
    again: Again | None
    short: int
    corpus: int
    questions: int | None
    micro: int


PARTS = {
    "full": Part(
        doc_max_length=256,
        single=3,
        rates=(4, 16, 32, 64, 128),
        warm_up=Run(26000, 64, 1e-3, 2),
        stage1=Run(32000, 64, 5e-4, 2),
        stage1_2=Run(11808, 32, 2e-4, 2),
        stage2=Run(11670, 32, 5e-5, 1),
        retrieval=None,
        text_rag=Run(23478, 32, 2e-4, 1),
        ablation=Run(5000, 64, 5e-4, 1),
        further={},
        again=None,
        short=256,
        corpus=0,
        questions=None,
        micro=64,
    ),
    "cpu": Part(
        doc_max_length=128,
        single=19,
        rates=(4,),
        warm_up=Run(1200, 4, 1e-3),
        stage1=Run(1280, 4, 8e-4),
        stage1_2=Run(800, 4, 5e-4),
        stage2=Run(1000, 4, 2e-4),
        retrieval=Run(2190, 16, 5e-4, 2),
        text_rag=Run(240, 8, 3e-4),
        ablation=None,
        further={
            "more": Further(Run(2400, 4, 8e-4), "0.35,0.65"),
            "order": Further(Run(800, 4, 6e-4), "0.35,0.65", 1200, 3000, DECAY),
            "words": Further(Run(2400, 4, 8e-4), "0.2,0.3,0.5", 1600, 3700, DECAY),
            "follow": Further(Run(3200, 4, 8e-4), "0.3,0.1,0.3,0.3", 0, 4500, (*DECAY, *NO_DROPOUT), True),
            "even": Further(
                Run(1600, 4, 8e-4), "0.4,0.1,0.25,0.25", 1000, 5000, (*DECAY, *NO_DROPOUT, "--even_spans"), True, 2500
            ),
        },
        again=Again(
            Further(
                Run(2800, 4, 8e-4), "0.25,0.2,0.35,0.2", 1640, flags=("--freeze_compressor", *NO_DROPOUT), long=True
            ),
            Run(6400, 8, 5e-4),
            single=19,
        ),
        short=80,
        corpus=400,
        questions=25,
        micro=8,
    ),
}
