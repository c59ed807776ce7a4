"""Conversations of every task in the toy world, and the shares in which training mixes them.

The format is the official message-like one (`images`, `messages` with `<image>`; paper, section
4.1). One scene in ten is held out by hash: no example for training contains it, in any task.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from ..tokenizer import EDITING_PROMPT, EDITING_REPLY, GENERATION_PROMPT, GENERATION_REPLY, IMAGE
from .edits import EDITS, edited, instruction, plan
from .language import Voice
from .prompts import CATEGORIES, canonical_scene, phrase_prompt, short_prompt
from .questions import QA, QUESTIONS, make_question, scene_caption, with_reasoning
from .world import Rng, Scene, choice, held_out, jittered, random_scene

KINDS = {"generate": (*CATEGORIES, "several", "caption"), "understand": (*QUESTIONS, "describe")}
KINDS["edit"] = EDITS
ZH_SHARE = 0.4
SHORT_SHARE = 0.5  # of prompts; 0.2 in the paper, but here they carry six categories
DETAIL = {"understand": 0.25, "edit": 0.6}  # shares of textured sources
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


def draw(rng: Rng, task: str, kind: str, most: int = 4) -> tuple[tuple[Scene, ...], dict]:
    """The scenes of an example, of at most `most` objects, and the spec of a short prompt."""
    if task == "multi_turn":
        scenes, spec = draw(rng, kind, _random_kind(rng, kind).split("+")[0], most)
        for _ in range(2):
            target = rng.random() < 0.5 and edited(rng, _random_kind(rng, "edit"), scenes[-1])
            scenes += (target,) if target else ()
        return scenes, spec
    if task == "generate" and kind != "caption":
        spec = short_prompt(rng, kind)
        scene = canonical_scene(spec)
        return (replace(scene, objects=tuple(jittered(rng, o) for o in scene.objects)),), spec
    least = 2 if kind in ("remove", "relation") else 1
    detail = {} if task == "generate" else {"detail": DETAIL[task]}
    while True:
        scene = random_scene(rng, int(rng.integers(least, max(least, most) + 1)), **detail)
        if task != "edit":
            return (scene,), {}
        if target := edited(rng, kind, scene):
            return (scene, target), {}


def write(
    rng: Rng, task: str, kind: str, scenes: tuple, spec: dict, zh: bool, words: str = "any"
) -> Example | None:
    """An example about scenes, in one user's words; None when the scene has no such question.

    words: "any", "plain" or "as typed", see `Voice`.
    """
    voice, language, answer = Voice(rng, zh, words), "zh" if zh else "en", ""
    if task == "multi_turn":
        return _multi_turn(rng, kind, scenes, spec, zh)
    if task == "generate":
        text = phrase_prompt(voice, spec) if spec else voice.caption(scenes[0])
        text = voice.utter("prompt", text)
        messages = _turn(GENERATION_PROMPT[language].format(text), GENERATION_REPLY[language])
    elif task == "edit":
        text, answer = instruction(voice, *scenes), plan(*scenes, zh)
        thought = scene_caption(scenes[0], zh) + answer if rng.random() < COT_SHARE else ""
        messages = _turn(EDITING_PROMPT.format(text), thought + EDITING_REPLY[language])
    else:
        turns: list[QA] = []
        for k in kind.split("+"):
            qa = make_question(voice, k, scenes[0])
            if qa and qa not in turns:
                turns.append(qa)
            elif not turns:
                return None  # the first question needs another scene
        messages = [m for qa in turns for m in _turn(qa.question, with_reasoning(qa, zh))]
        messages[0]["content"] = IMAGE + messages[0]["content"]
        if not kind.startswith("describe"):  # the text then holds what the answers need
            messages[1]["content"] = scene_caption(scenes[0], zh) + messages[1]["content"]
        text, answer = turns[0].question, turns[0].answer
    return Example(task, kind, language, scenes, tuple(messages), text, answer.strip(), spec)


def _multi_turn(rng: Rng, kind: str, scenes: tuple, spec: dict, zh: bool) -> Example | None:
    """A task of one `kind`, then two questions or edits about the latest image, not shown again."""
    voice, count = Voice(rng, zh), 2 if kind == "edit" else 1
    asked = _random_kind(rng, "understand") if kind == "understand" else kind
    first = write(rng, kind, asked.split("+")[0], scenes[:count], spec, zh)
    if first is None:
        return None
    messages, is_captioned, edits = list(first.messages), kind == "understand", scenes[count:]
    turns, source = [*edits, *[None] * (2 - len(edits))], scenes[count - 1]
    if len(edits) < 2 and rng.random() < 0.5:  # two edits keep their order
        turns.reverse()
    for target in turns:
        if target:
            text = instruction(voice, source, target)
            reply = plan(source, target, zh) + EDITING_REPLY[first.language]
        else:
            qa = make_question(voice, rng.choice(QUESTIONS, p=QUESTION_SHARES), source)
            if not qa:
                continue
            text, reply = qa.question, with_reasoning(qa, zh)
        if not is_captioned:  # the model describes each image once
            reply = scene_caption(source, zh) + reply
        is_captioned = not target
        source = target or source
        messages += _turn(text, reply)
    return replace(first, task="multi_turn", kind=kind, scenes=scenes, messages=tuple(messages))


def rewrite(rng: Rng, ex: Example) -> Example:
    """The same scenes in other words: new language, wording and, of an image, new questions."""
    while True:
        kind = _random_kind(rng, ex.task) if ex.task == "understand" else ex.kind
        found = write(rng, ex.task, kind, ex.scenes, ex.spec, rng.random() < ZH_SHARE)
        if found:
            return found


def _random_kind(rng: Rng, task: str) -> str:
    if task == "generate":
        is_short = rng.random() < SHORT_SHARE
        return choice(rng, (*CATEGORIES, "several")) if is_short else "caption"
    if task == "understand":
        if rng.random() < DESCRIBE_SHARE:
            return "describe"
        return "+".join(rng.choice(QUESTIONS, QUESTIONS_PER_IMAGE, p=QUESTION_SHARES))
    if task == "multi_turn":
        return choice(rng, ("understand", "generate", "generate", "edit"))
    return str(rng.choice(EDITS, p=EDIT_SHARES))


def sample_example(
    rng: Rng,
    task: str,
    kind: str = "",
    zh: bool | None = None,
    most: int = 4,
    unseen: bool = False,
    words: str = "any",
) -> Example:
    """A random example of a task, of at most `most` objects; by default as training mixes them."""
    while True:
        is_zh = rng.random() < ZH_SHARE if zh is None else zh
        chosen = kind or _random_kind(rng, task)
        scenes, spec = draw(rng, task, chosen.split("+")[0], most)
        if any(held_out(scene.key) for scene in scenes) != unseen:
            continue
        if found := write(rng, task, chosen, scenes, spec, is_zh, words):
            return found
