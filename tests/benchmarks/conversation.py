"""What a conversation retains of a generated image: three ways to keep it, compared.

    python tests/benchmarks/conversation.py --cases 40

The model makes an image of an unseen caption. The same conversation then has two questions, for the
background and the number of objects, and an edit of the background. Answers are compared with what
the checker reads in the image; unreadable images are left out. `fresh` shows the image to a new
conversation each time, without a history.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import numpy as np

from nexus_min.chat import HISTORY_MODES, Chat
from nexus_min.pipeline import NexusGen
from nexus_min.tokenizer import EDITING_PROMPT, GENERATION_PROMPT
from nexus_min.toy import score
from nexus_min.toy.language import NUMBERS
from nexus_min.toy.questions import final_answer
from nexus_min.toy.tasks import sample_example
from nexus_min.toy.world import BACKGROUNDS

ASK = ("What color is the background?", "How many objects are there?")


def send_turn(chat, text: str, images=()) -> tuple[str, object]:
    """The words and the image of a turn."""
    events = list(chat.say(text, images))
    words = "".join(value for kind, value in events if kind == "text")
    return words, dict(events).get("image")


def read(image):
    """What the checker sees."""
    return score.read(np.asarray(image)[None])[0]


def case(model: NexusGen, keep: str, caption: str, goal: str) -> dict | None:
    """Rights and wrongs of one conversation; None when the image cannot be read."""
    chat = Chat(model, keep="slots" if keep == "fresh" else keep)
    _, image = send_turn(chat, GENERATION_PROMPT["en"].format(caption))
    if image is None or not (reading := read(image)).known:
        return None
    images = [image] if keep == "fresh" else []

    def send(text: str):
        return send_turn(Chat(model) if keep == "fresh" else chat, text, images)

    answers = [final_answer(send(text)[0]) for text in ASK]
    instruction = f"Change the background to {goal}."
    edited = send(EDITING_PROMPT.format(instruction) if images else instruction)[1]
    wanted = replace(reading.scene, background=goal)
    return {
        "background": answers[0] == reading.scene.background,
        "count": answers[1] == NUMBERS[len(reading.scene.objects)],
        "drew": edited is not None,
        "edit, background": edited is not None and read(edited).scene.background == goal,
        "edit, exact": edited is not None and read(edited).is_exactly(wanted),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--model", default="tiny")
    args = parser.parse_args()
    model, rng = NexusGen.load(args.model), np.random.default_rng(0)
    captions = [
        sample_example(rng, "generate", "caption", False, unseen=True) for _ in range(args.cases)
    ]
    for keep in ("fresh", *HISTORY_MODES):
        rows = []
        for ex in captions:
            others = [b for b in BACKGROUNDS if b != ex.scenes[0].background]
            rows.append(case(model, keep, ex.text, others[len(rows) % len(others)]))
        rows = [row for row in rows if row]
        means = {name: round(float(np.mean([row[name] for row in rows])), 2) for name in rows[0]}
        print(json.dumps({"keep": keep, "n": len(rows), **means}), flush=True)


if __name__ == "__main__":
    main()
