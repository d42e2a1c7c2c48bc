"""Every prompt text, in one place. Saved in config.json under `prompts` and read back from it."""

ANSWER, QA, PARAPHRASE = "answer", "qa", "paraphrase"

DEFAULT_PROMPTS: dict[str, str | list[str]] = {
    "answer_system": (
        "You are a helpful assistant. Read the background documents and answer the question from them, "
        "as briefly as you can."
    ),
    "answer_user": "Background:\n{docs}\n\nQuestion:{query}",
    "qa_system": (
        "You are a helpful assistant. Read the background document, then write questions that it answers, "
        "each followed by its answer."
    ),
    "qa_user": "Background:\n{docs}\n\nWrite the questions and their answers.",
    "paraphrase_system": "You are a helpful assistant. Say what the document says, in other words.",
    "paraphrase_instructions": [
        "Background: {docs}\n\nThe background, told again in other words:",
        "Background: {docs}\n\nWrite down everything the background says, in your own words.",
        "{docs}\n\nRewrite the text above without losing any of its facts.",
        "Here is a document: {docs}\n\nPut it differently, keeping every name, number and date.",
        "{docs}\n\nWhat does this document say? Tell it in full.",
        "Explain the following background so that somebody who cannot see it knows all of it: {docs}",
        "Background: {docs}\n\nUnfold this background into plain prose.",
        "{docs}\n\nWrite a passage that means the same as the one above.",
    ],
}

# The baseline without documents; no checkpoint trains on it, so it is not saved with one.
CLOSED_BOOK_SYSTEM = "You are a helpful assistant. Answer the question, as briefly as you can."
CLOSED_BOOK_USER = "Question:{query}"


def check_prompts(prompts: dict) -> None:
    """Raises ValueError when a key is missing or unknown, or a text lacks a placeholder it needs."""
    if set(prompts) != set(DEFAULT_PROMPTS):
        raise ValueError(f"prompts must have exactly the keys {sorted(DEFAULT_PROMPTS)}, got {sorted(prompts)}")
    instructions = prompts["paraphrase_instructions"]
    if not isinstance(instructions, (list, tuple)) or not instructions:
        raise ValueError("prompts['paraphrase_instructions'] must be a list of at least one text")
    needed = [
        ("answer_user", prompts["answer_user"], ("{docs}", "{query}")),
        ("qa_user", prompts["qa_user"], ("{docs}",)),
    ]
    needed += [("paraphrase_instructions", text, ("{docs}",)) for text in instructions]
    for key, text, placeholders in needed:
        for placeholder in placeholders:
            if text.count(placeholder) != 1:
                raise ValueError(f"prompts[{key!r}] must contain {placeholder} exactly once: {text!r}")


def qa_answer(questions: list[str], answers: list[str]) -> str:
    """The assistant's turn of a stage-1 QA set."""
    return "\n".join(f"Question: {q}\nAnswer: {a}" for q, a in zip(questions, answers, strict=True))
