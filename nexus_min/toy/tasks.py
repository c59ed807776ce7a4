"""Conversations of every task in the toy world, and the shares in which training mixes them.

The format is the official message-like one (`images`, `messages` with `<image>`; paper, section
4.1). One scene in ten is held out by hash: no example for training contains it, in any task.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from ..tokenizer import EDITING_PROMPT, EDITING_REPLY, GENERATION_PROMPT, GENERATION_REPLY, IMAGE
from .edits import EDITS, edit_pair, plan
from .language import caption
from .prompts import CATEGORIES, canonical_scene, phrase_prompt, short_prompt
from .questions import QA, QUESTIONS, make_question, scene_caption, with_reasoning
from .world import Rng, Scene, choice, held_out, jittered, random_scene, random_texture

KINDS = {"generate": (*CATEGORIES, "caption"), "understand": (*QUESTIONS, "describe")}
KINDS["edit"] = EDITS
ZH_SHARE = 0.4
SHORT_SHARE = 0.4  # of prompts; 0.2 in the paper, but here they carry six categories
DESCRIBE_SHARE = 0.2  # of the conversations about an image
COT_SHARE = 0.9  # of the replies to edits have a chain of thought before the image
QUESTIONS_PER_IMAGE = 4  # at most: more answers for the same work
QUESTION_SHARES = np.array([3, 4, 4, 1, 4, 4, 1, 5]) / 26  # hard kinds are frequent
EDIT_SHARES = np.array([5, 3, 3, 4, 1, 3, 1]) / 20  # so are kinds that refer to an object


@dataclass(frozen=True)
class Example:
    """One conversation with its images (as scenes), and what it takes to score the reply."""

    task: str  # "understand", "generate", "edit", or "multi_turn": several of these
    kind: str  # of KINDS; several questions are joined by "+"
    language: str
    scenes: tuple[Scene, ...]  # the images, in the order of their <image> placeholders
    messages: tuple[dict, ...]
    text: str  # the bare prompt, question or instruction
    answer: str = ""  # to the first question, or the plan of an edit
    spec: dict = field(default_factory=dict)  # what a short prompt names, for `satisfies`

    @property
    def unseen(self) -> bool:
        return any(held_out(scene.key) for scene in self.scenes)


def _turn(user: str, assistant: str) -> tuple[dict, dict]:
    return {"role": "user", "content": user}, {"role": "assistant", "content": assistant}


def generation_example(rng: Rng, kind: str, zh: bool, most: int = 4) -> Example:
    """A prompt of one of CATEGORIES, or a long "caption" of a scene of at most `most` objects."""
    language, spec = "zh" if zh else "en", {}
    if kind == "caption":
        scene = random_scene(rng, int(rng.integers(1, most + 1)))
        text = caption(rng, scene, zh)
    else:
        spec = short_prompt(rng, kind)
        scene = canonical_scene(spec)
        scene = replace(scene, objects=tuple(jittered(rng, o) for o in scene.objects))
        text = phrase_prompt(rng, spec, zh)
    messages = _turn(GENERATION_PROMPT[language].format(text), GENERATION_REPLY[language])
    return Example("generate", kind, language, (scene,), messages, text, spec=spec)


def question_example(rng: Rng, kind: str, zh: bool, most: int = 4) -> Example:
    """Questions of the kinds in `kind` ("count+where") about one random scene.

    The first reply begins with a caption: the text then holds what the answers need.
    """
    kinds = kind.split("+")
    least = 2 if kinds[0] == "relation" else 1
    turns: list[QA] = []
    while not turns:
        scene = random_scene(rng, int(rng.integers(least, max(least, most) + 1)), detail=0.25)
        for k in kinds:
            qa = make_question(rng, k, scene, zh)
            if qa and qa not in turns:
                turns.append(qa)
            elif not turns:
                break  # the first question needs another scene
    messages = [m for qa in turns for m in _turn(qa.question, with_reasoning(qa, zh))]
    messages[0]["content"] = IMAGE + messages[0]["content"]
    if kinds[0] != "describe":
        messages[1]["content"] = scene_caption(scene, zh) + messages[1]["content"]
    common = ("understand", kind, "zh" if zh else "en", (scene,), tuple(messages))
    return Example(*common, turns[0].question, turns[0].answer)


def edit_example(rng: Rng, kind: str, zh: bool, most: int = 4, detail: float = 0.6) -> Example:
    """An edit of one of EDITS; `detail` is the share of textured sources."""
    least = 2 if kind == "remove" else 1
    pair = None
    while not pair:
        scene = random_scene(rng, int(rng.integers(least, max(least, most) + 1)))
        if rng.random() < detail:
            scene = replace(scene, texture=random_texture(rng))
        pair = edit_pair(rng, kind, scene, zh)
    (target, text), language = pair, "zh" if zh else "en"
    steps = plan(scene, target, zh)
    thought = scene_caption(scene, zh) + steps if rng.random() < COT_SHARE else ""
    messages = _turn(EDITING_PROMPT.format(text), thought + EDITING_REPLY[language])
    return Example("edit", kind, language, (scene, target), messages, text, steps.strip())


def multi_turn_example(rng: Rng, kind: str, zh: bool, most: int = 4) -> Example:
    """A task of one `kind`, then two questions or edits about the latest image, not shown again."""
    first = MAKERS[kind](rng, _random_kind(rng, kind).split("+")[0], zh, most)
    scenes, messages, is_captioned = list(first.scenes), list(first.messages), kind == "understand"
    for _ in range(2):
        scene = scenes[-1]
        if rng.random() < 0.5:
            pair = edit_pair(rng, _random_kind(rng, "edit"), scene, zh)
            if not pair:
                continue
            target, text = pair
            reply = plan(scene, target, zh) + EDITING_REPLY[first.language]
            scenes.append(target)
        else:
            qa = make_question(rng, rng.choice(QUESTIONS, p=QUESTION_SHARES), scene, zh)
            if not qa:
                continue
            text, reply = qa.question, with_reasoning(qa, zh)
        if not is_captioned:  # the model describes each image once
            reply = scene_caption(scene, zh) + reply
        is_captioned = scene is scenes[-1]
        messages += _turn(text, reply)
    turns = {"scenes": tuple(scenes), "messages": tuple(messages)}
    return replace(first, task="multi_turn", kind=kind, **turns)


MAKERS = {"understand": question_example, "generate": generation_example, "edit": edit_example}
MAKERS["multi_turn"] = multi_turn_example


def _random_kind(rng: Rng, task: str) -> str:
    if task == "generate":
        return choice(rng, CATEGORIES) if rng.random() < SHORT_SHARE else "caption"
    if task == "understand":
        if rng.random() < DESCRIBE_SHARE:
            return "describe"
        return "+".join(rng.choice(QUESTIONS, QUESTIONS_PER_IMAGE, p=QUESTION_SHARES))
    if task == "multi_turn":
        return choice(rng, ("understand", "generate", "generate", "edit"))
    return str(rng.choice(EDITS, p=EDIT_SHARES))


def sample_example(
    rng: Rng, task: str, kind: str = "", zh: bool | None = None, most: int = 4, unseen: bool = False
) -> Example:
    """A random example of a task, of at most `most` objects; by default as training mixes them."""
    while True:
        is_zh = rng.random() < ZH_SHARE if zh is None else zh
        found = MAKERS[task](rng, kind or _random_kind(rng, task), is_zh, most)
        if found.unseen == unseen:
            return found
