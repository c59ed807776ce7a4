"""What is asked in the toy world: conversations of every task, and the mixture that trains.

Every example is a conversation in the official message-like format (`images`, `messages` with
`<image>`; paper, section 4.1) plus what a checker needs. A prompt names some attributes of a scene;
what it leaves open is canonical (`prompts`). One scene in ten is held out by hash: training never
shows it, asks for it or edits from or to it, in any task, wording or language.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from ..tokenizer import EDITING_PROMPT, EDITING_REPLY, GENERATION_PROMPT, GENERATION_REPLY, IMAGE
from .edits import EDITS, edit_pair, plan
from .language import caption
from .prompts import CATEGORIES, canonical_scene, short_prompt, word_prompt
from .questions import QUESTIONS, Asked, ask, spoken, what_is_seen
from .world import Scene, choice, held_out, jittered, random_scene, random_texture


@dataclass(frozen=True)
class Example:
    """One conversation with its images (as scenes), and what it takes to score the reply."""

    task: str  # "understand", "generate", "edit", or "talk": several of these
    kind: str  # of CATEGORIES, "caption", QUESTIONS (several joined by "+"), "describe", EDITS
    language: str
    scenes: tuple[Scene, ...]  # the images, in the order of their <image> placeholders
    messages: tuple[dict, ...]
    text: str  # the bare prompt, question or instruction
    answer: str = ""  # to the first question, or what an edit's reply says will change, or ""
    wanted: dict = field(default_factory=dict)  # what a short prompt names, for `satisfies`

    @property
    def unseen(self) -> bool:
        """Whether one of its scenes is held out; all wordings of a prompt mean one scene."""
        return any(held_out(scene.key) for scene in self.scenes)


def _generation(kind: str, zh: bool, text: str, scene: Scene, wanted: dict) -> Example:
    language = "zh" if zh else "en"
    messages = (
        {"role": "user", "content": GENERATION_PROMPT[language].format(text)},
        {"role": "assistant", "content": GENERATION_REPLY[language]},
    )
    return Example("generate", kind, language, (scene,), messages, text, wanted=wanted)


def generation_example(rng: np.random.Generator, kind: str, zh: bool, most: int = 4) -> Example:
    """A prompt of one of CATEGORIES, or a long "caption" of a scene of at most `most` objects."""
    if kind == "caption":
        scene = random_scene(rng, int(rng.integers(1, most + 1)))
        return _generation(kind, zh, caption(rng, scene, zh), scene, {})
    wanted = short_prompt(rng, kind)
    scene = canonical_scene(wanted)
    scene = replace(scene, objects=tuple(jittered(rng, o) for o in scene.objects))
    return _generation(kind, zh, word_prompt(rng, wanted, zh), scene, wanted)


def question_example(rng: np.random.Generator, kind: str, zh: bool, most: int = 4) -> Example:
    """A question of one of QUESTIONS, or "describe", about a random scene (a quarter textured).

    `kind` may name several, joined by "+": asked one after the other about one image. Before the
    first answer the model says what it sees, and before each what decides it: the object, a verdict
    on each object, two rows or columns, how they lie and what was asked. So what a question means
    is looked up in words: that is learnt far sooner than finding in an image what a word means.
    """
    kinds = kind.split("+")
    least = 2 if kinds[0] == "relation" else 1
    asked: list[Asked] = []
    while not asked:
        scene = random_scene(rng, int(rng.integers(least, max(least, most) + 1)), detail=0.25)
        for k in kinds:
            found = ask(rng, k, scene, zh)
            if found and found not in asked:
                asked.append(found)
            elif not asked:
                break
    sees = "" if kinds[0] == "describe" else what_is_seen(scene, zh)
    messages = []
    for question, thought, answer in asked:
        said = spoken(thought, answer, zh)
        messages += [
            {"role": "user", "content": question if messages else IMAGE + question},
            {"role": "assistant", "content": said if messages else sees + said},
        ]
    language, (text, _, answer) = "zh" if zh else "en", asked[0]
    return Example("understand", kind, language, (scene,), tuple(messages), text, answer)


def edit_example(
    rng: np.random.Generator, kind: str, zh: bool, most: int = 4, detail: float = 0.6
) -> Example:
    """An edit of one of EDITS; both ways occur alike (add / remove, there / back)."""
    least = 2 if kind == "remove" else 1
    while True:
        scene = random_scene(rng, int(rng.integers(least, max(least, most) + 1)))
        if rng.random() < detail:
            scene = replace(scene, texture=random_texture(rng))
        if pair := edit_pair(rng, kind, scene, zh):
            break
    target, text = pair
    language = "zh" if zh else "en"
    told, reply = plan(scene, target, zh), EDITING_REPLY[language]
    thought = what_is_seen(scene, zh) + told if rng.random() < TELLS else ""
    messages = (
        {"role": "user", "content": EDITING_PROMPT.format(text)},
        {"role": "assistant", "content": thought + reply},
    )
    return Example("edit", kind, language, (scene, target), messages, text, told.strip())


def talk_example(rng: np.random.Generator, kind: str, zh: bool, most: int = 4) -> Example:
    """A task of one `kind` ("understand", "generate", "edit") and two turns about what came of it.

    These are questions and edits of the latest image, which is not shown again.
    """
    first = MAKERS[kind](rng, _random_kind(rng, kind).split("+")[0], zh, most)
    scenes, messages, said_of = list(first.scenes), list(first.messages), kind == "understand"
    for _ in range(2):
        scene, sees = scenes[-1], "" if said_of else what_is_seen(scenes[-1], zh)
        if rng.random() < 0.5:
            if not (pair := edit_pair(rng, _random_kind(rng, "edit"), scene, zh)):
                continue
            target, text = pair
            reply = plan(scene, target, zh) + EDITING_REPLY[first.language]
            scenes.append(target)
        else:
            if not (asked := ask(rng, rng.choice(QUESTIONS, p=QUESTION_SHARES), scene, zh)):
                continue
            text, reply = asked[0], spoken(*asked[1:], zh)
        said_of = scene is scenes[-1]
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": sees + reply})
    return replace(first, task="talk", kind=kind, scenes=tuple(scenes), messages=tuple(messages))


MAKERS = {
    "understand": question_example,
    "generate": generation_example,
    "edit": edit_example,
    "talk": talk_example,
}
ZH_SHARE = 0.4
TURNS = 4  # most questions in a conversation
QUESTION_SHARES = np.array([3, 4, 4, 1, 4, 4, 1, 5]) / 26  # what is hard is asked often
TELLS = 0.9  # of the replies to an edit say what is seen, and what will change, before the image
# what refers to an object takes longest to learn
EDIT_SHARES = np.array([5, 3, 3, 4, 1, 3, 1]) / 20


def example(
    rng: np.random.Generator,
    task: str,
    kind: str | None = None,
    zh: bool | None = None,
    most: int = 4,
    unseen: bool = False,
) -> Example:
    """A random example of a task, seen or `unseen` in training.

    Kind and language are those of the training mixture unless given. Captions are 20 % short, 80 %
    long in the paper; here 40 % are short, since they carry six categories.
    """
    while True:
        zh_now = rng.random() < ZH_SHARE if zh is None else zh
        found = MAKERS[task](rng, kind or _random_kind(rng, task), zh_now, most)
        if found.unseen == unseen:
            return found


def _random_kind(rng: np.random.Generator, task: str) -> str:
    if task == "generate":
        return choice(rng, CATEGORIES) if rng.random() < 0.4 else "caption"
    if task == "understand":  # several turns about one image: more answers for the same work
        if rng.random() < 0.2:
            return "describe"
        return "+".join(rng.choice(QUESTIONS, TURNS, p=QUESTION_SHARES))
    if task == "talk":
        return choice(rng, ("understand", "generate", "generate", "edit"))
    return str(rng.choice(EDITS, p=EDIT_SHARES))
