"""Draw the pictures of the bundled vision-language task, and write its questions.

Four categories answer to the four of the paper (method 4.1): action (what somebody does, which way a ball
moves), attribute (colour, shape, number), identity (which handwritten digit) and function (what a thing is
for). Every picture is 112 x 112 pixels, drawn four times as large and reduced. Clutter, a patch that hides
something and loose drawing keep the questions from being certain: a model that is always right and always
sure would hide what a perturbation does.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits

from fihelpers.data import write_atomically

SIZE = 112
SCALE = 4  # pictures are drawn this many times larger
SUBJECTS = ("action", "attribute", "identity", "function")
TRAIN, VAL, TEST = "train", "val", "test"
DIGITS_OF = {TRAIN: slice(0, 1200), VAL: slice(1200, 1450), TEST: slice(1450, 1797)}
COUNTS = {VAL: 60, TEST: 120}  # questions a category

Colour = tuple[int, int, int]
Point = tuple[float, float]

COLOURS: dict[str, Colour] = {
    "red": (205, 40, 40),
    "green": (45, 150, 60),
    "blue": (45, 85, 200),
    "yellow": (235, 205, 45),
    "orange": (240, 135, 35),
    "purple": (130, 60, 165),
    "brown": (125, 80, 45),
    "pink": (240, 140, 180),
}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WAYS: dict[str, Point] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

# Directions of the torso, both upper arms, both lower arms, both thighs and both shins, in degrees: 0 is
# down, 90 is right, 180 is up.
POSES: dict[str, tuple[int, ...]] = {
    "running": (162, 60, -70, 140, -10, 65, -35, -5, -95),
    "sitting": (180, 35, 30, 75, 70, 90, 80, 0, 5),
    "jumping": (180, 135, -135, 165, -165, 45, -45, -20, 20),
    "waving": (180, 125, -15, 190, -10, 10, -10, 5, -5),
    "lying": (92, -80, -100, -85, -95, -88, -92, -88, -92),
    "kicking": (195, 50, -60, 70, -30, 88, -8, 86, -6),
    "bowing": (105, 5, -5, 0, 0, 8, -8, 4, -4),
    "standing": (180, 18, -18, 8, -8, 9, -9, 5, -5),
}
THINGS: dict[str, str] = {  # thing: what it is for; the first words differ
    "hammer": "driving nails",
    "scissors": "cutting paper",
    "key": "opening locks",
    "umbrella": "stopping rain",
    "cup": "drinking tea",
    "ladder": "climbing walls",
    "pencil": "writing letters",
    "clock": "telling time",
    "lamp": "giving light",
    "broom": "sweeping floors",
    "spoon": "eating soup",
    "glasses": "reading print",
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")

PAIRS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
ANSWERS = (*POSES, *WAYS, *COLOURS, *SHAPES, *NUMBERS, *THINGS.values())

QUESTIONS: dict[
    str, dict[str, tuple[str, ...]]
] = {  # several wordings of one question; those of a split are never asked in another
    "pose": {
        TRAIN: ("What is the person doing?", "What does the person do?", "Which action is shown?"),
        VAL: ("Which action does the person do?",),
        TEST: ("What action is the person doing?",),
    },
    "motion": {
        TRAIN: ("Which way does the ball move?", "Where does the ball go?", "Which way is the ball going?"),
        VAL: ("Where is the ball going?",),
        TEST: ("Which way does the ball go?",),
    },
    "colour": {
        TRAIN: ("What colour is the {}?", "Which colour does the {} have?", "The {} has which colour?"),
        VAL: ("The {} is of which colour?",),
        TEST: ("What colour does the {} have?",),
    },
    "shape": {
        TRAIN: ("Which shape is {}?", "What shape is the {} one?", "Which shape has the colour {}?"),
    },
    "count": {
        TRAIN: ("How many shapes are shown?", "How many shapes are there?", "What is the number of shapes?"),
        VAL: ("How many shapes does the picture have?",),
        TEST: ("What number of shapes is shown?",),
    },
    "digit": {
        TRAIN: ("Which digit is shown?", "Which digit is written here?", "What digit is this?"),
        VAL: ("Which digit is this?",),
        TEST: ("What digit is written here?",),
    },
    "digit at": {
        TRAIN: ("Which digit is on the {}?", "What digit is on the {}?", "Which digit is at the {}?"),
        VAL: ("What digit is at the {}?",),
        TEST: ("Which digit is written on the {}?",),
    },
    "use": {
        TRAIN: (
            "What is this thing for?",
            "What is the use of this thing?",
            "What does one do with this thing?",
        ),
        VAL: ("What is the thing used for?",),
        TEST: ("What does one use this thing for?",),
    },
    "use at": {
        TRAIN: ("What is the thing on the {} for?", "What is the use of the thing on the {}?"),
        VAL: ("What does one do with the thing on the {}?",),
        TEST: ("What is the thing at the {} for?",),
    },
    "detail": {TRAIN: ("What colour is the small dot?", "Which colour does the small dot have?")},
}


@dataclass(frozen=True)
class Question:
    """One question on a picture: its kind in QUESTIONS, what fills the wording, the answer, wrong answers."""

    kind: str
    about: str
    answer: str
    wrong: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Picture:
    """An RGB picture, uint8 (112, 112, 3), of one subject, with the questions it answers.

    ``detail`` asks for something small that only a close look finds.
    """

    subject: str
    pixels: np.ndarray
    questions: tuple[Question, ...]
    detail: Question | None = None


@dataclass(frozen=True)
class Item:
    """A question as it is asked: four options and the index of the right one."""

    question: str
    options: tuple[str, ...]
    answer: int


class Canvas:
    """Drawing in units of pixels of the final picture, in one stretch of paper of a light colour."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.paper: Colour = (rng.randint(205, 250), rng.randint(205, 250), rng.randint(205, 250))
        self.image = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), self.paper)
        self.draw = ImageDraw.Draw(self.image)

    def line(self, points: Sequence[Point], colour: Colour, width: float) -> None:
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self.draw.line(scaled, colour, max(1, round(width * SCALE)), joint="curve")
        for x, y in points[:: max(1, len(points) - 1)]:
            self.disc(x, y, width / 2, colour)

    def disc(self, x: float, y: float, r: float, colour: Colour) -> None:
        self.draw.ellipse([(x - r) * SCALE, (y - r) * SCALE, (x + r) * SCALE, (y + r) * SCALE], colour)

    def ring(self, x: float, y: float, r: float, colour: Colour, width: float) -> None:
        box = [(x - r) * SCALE, (y - r) * SCALE, (x + r) * SCALE, (y + r) * SCALE]
        self.draw.ellipse(box, outline=colour, width=max(1, round(width * SCALE)))

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        self.draw.polygon([(x * SCALE, y * SCALE) for x, y in points], colour)

    def clutter(self) -> None:
        """Thin strokes and specks that mean nothing."""
        rng = self.rng
        for _ in range(rng.randint(0, 6)):
            x, y, turn = rng.uniform(0, SIZE), rng.uniform(0, SIZE), rng.uniform(0, 2 * math.pi)
            length, grey = rng.uniform(4, 22), rng.randint(110, 190)
            end = (x + length * math.cos(turn), y + length * math.sin(turn))
            self.line([(x, y), end], (grey, grey, grey), rng.uniform(0.7, 1.6))

    def hide(self, largest: float) -> None:
        """A grey smudge that may hide a part of what is asked for."""
        rng = self.rng
        size, level = rng.uniform(6, largest), rng.randint(110, 170)
        x, y = rng.uniform(12, SIZE - 12), rng.uniform(12, SIZE - 12)
        for _ in range(7):
            aside, down = rng.gauss(0, size / 3.5), rng.gauss(0, size / 3.5)
            self.disc(x + aside, y + down, rng.uniform(0.15, 0.35) * size, (level, level, level))

    def pixels(self) -> np.ndarray:
        return np.asarray(self.image.resize((SIZE, SIZE), Image.Resampling.BOX))


def tinted(rng: random.Random, colour: Colour, spread: int = 26) -> Colour:
    """The colour, a little off."""
    r, g, b = (max(0, min(255, c + rng.randint(-spread, spread))) for c in colour)
    return r, g, b


def any_colour(rng: random.Random) -> Colour:
    """A tinted colour, each with the same probability."""
    return tinted(rng, COLOURS[rng.choice(list(COLOURS))])


# --- action


def draw_pose(canvas: Canvas, pose: Sequence[float], x: float, y: float, unit: float, flip: int) -> None:
    """A figure of strokes: hip at (x, y), the torso `unit` long, mirrored where flip is -1."""
    colour = tinted(canvas.rng, (60, 60, 75), 35)
    width = unit * canvas.rng.uniform(0.11, 0.18)

    def end(start: Point, angle: float, length: float) -> Point:
        a = math.radians(angle)
        return start[0] + flip * length * unit * math.sin(a), start[1] + length * unit * math.cos(a)

    hip = (x, y)
    torso, *limbs = pose
    neck = end(hip, torso, 1.0)
    head = end(neck, torso, 0.28)
    canvas.line([hip, neck], colour, width)
    canvas.disc(*head, 0.27 * unit, colour)
    for side in (0, 1):
        elbow, knee = end(neck, limbs[side], 0.5), end(hip, limbs[4 + side], 0.62)
        canvas.line([neck, elbow, end(elbow, limbs[2 + side], 0.5)], colour, width)
        canvas.line([hip, knee, end(knee, limbs[6 + side], 0.62)], colour, width)


def pose_picture(rng: random.Random, split: str) -> Picture:
    """A figure of strokes in one of the poses, half hidden, and the question which."""
    name = rng.choice(list(POSES))
    canvas = Canvas(rng)
    canvas.clutter()
    pose = [angle + rng.gauss(0, 13) for angle in POSES[name]]
    unit = rng.uniform(15, 26)
    draw_pose(canvas, pose, rng.uniform(45, 67), rng.uniform(50, 66), unit, rng.choice((-1, 1)))
    canvas.hide(30)
    return Picture("action", canvas.pixels(), (Question("pose", "", name, others(POSES, name)),))


def motion_picture(rng: random.Random, split: str) -> Picture:
    """A ball with paler and smaller traces behind it."""
    name = rng.choice(list(WAYS))
    canvas = Canvas(rng)
    canvas.clutter()
    dx, dy = WAYS[name]
    x, y, r = rng.uniform(40, 72), rng.uniform(40, 72), rng.uniform(6, 12)
    colour, paper = any_colour(rng), canvas.paper
    step, drift = rng.uniform(6, 10), rng.uniform(-0.35, 0.35)
    for k in range(rng.randint(2, 4), -1, -1):
        fade = 0.25 * k
        red, green, blue = (round(c * (1 - fade) + p * fade) for c, p in zip(colour, paper, strict=True))
        back = k * step
        place = (x - dx * back + dy * drift * back, y - dy * back + dx * drift * back)
        canvas.disc(*place, r * (1 - 0.1 * k), (red, green, blue))
    canvas.hide(26)
    return Picture("action", canvas.pixels(), (Question("motion", "", name, others(WAYS, name)),))


# --- attribute


def draw_shape(canvas: Canvas, name: str, x: float, y: float, r: float, colour: Colour) -> None:
    """Draws a named shape around (x, y), of radius r in pixels, slightly turned."""
    turn = canvas.rng.uniform(-0.2, 0.2)

    def corners(n: int, radii: Sequence[float], start: float) -> list[Point]:
        angles = [start + turn + 2 * math.pi * i / n for i in range(n)]
        return [
            (x + r * radii[i % len(radii)] * math.cos(a), y + r * radii[i % len(radii)] * math.sin(a))
            for i, a in enumerate(angles)
        ]

    if name == "circle":
        canvas.disc(x, y, r, colour)
    elif name == "ring":
        canvas.ring(x, y, r, colour, 0.32 * r)
    elif name == "cross":
        for start in (0, math.pi / 2):
            canvas.line(corners(2, (0.95,), start), colour, 0.5 * r)
    elif name == "square":
        canvas.polygon(corners(4, (1.15,), math.pi / 4), colour)
    elif name == "triangle":
        canvas.polygon(corners(3, (1.2,), -math.pi / 2), colour)
    else:
        canvas.polygon(corners(10, (1.25, 0.5), -math.pi / 2), colour)


def places(rng: random.Random, n: int) -> list[Point]:
    """Centres of n cells of a 3 x 3 grid, each moved a little."""
    cells = rng.sample([(i, j) for i in range(3) for j in range(3)], n)
    return [(20 + 36 * i + rng.uniform(-7, 7), 20 + 36 * j + rng.uniform(-7, 7)) for i, j in cells]


def shapes_picture(rng: random.Random, split: str) -> Picture:
    """Up to five shapes of different kinds and colours, and at times a small dot."""
    n = rng.randint(2, 5)
    names, colours = rng.sample(SHAPES, n), rng.sample(list(COLOURS), n + 1)
    canvas = Canvas(rng)
    canvas.clutter()
    spots = places(rng, n + 1)
    for name, colour, (x, y) in zip(names, colours, spots, strict=False):
        draw_shape(canvas, name, x, y, rng.uniform(8, 15), tinted(rng, COLOURS[colour]))
    detail = None
    if rng.random() < 0.5:
        canvas.disc(*spots[-1], rng.uniform(2.2, 3), tinted(rng, COLOURS[colours[-1]]))
        detail = Question("detail", "", colours[-1], others(COLOURS, colours[-1]))
    canvas.hide(24)
    asked = [Question("colour", s, c, others(COLOURS, c)) for s, c in zip(names, colours, strict=False)]
    if split == TRAIN:  # the model learns from it, but hardly to answer it: it stays near chance
        asked += [Question("shape", c, s, others(SHAPES, s)) for s, c in zip(names, colours, strict=False)]
    numbers = NUMBERS[1:7]
    asked += [Question("count", "", NUMBERS[n], others(numbers, NUMBERS[n]))] * 2
    return Picture("attribute", canvas.pixels(), tuple(asked), detail)


# --- identity


@lru_cache(maxsize=1)
def handwritten() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits: grey levels (1797, 8, 8) from 0 to 16, and which digit each is."""
    flat, targets = load_digits(return_X_y=True)
    return flat.reshape(-1, 8, 8), targets


def write_digit(canvas: Canvas, image: np.ndarray, x: float, y: float, side: float, colour: Colour) -> None:
    """Ink of one colour, as dense as the digit's grey levels."""
    grey = Image.fromarray((image * 15.9).astype(np.uint8))
    size = round(side * SCALE)
    ink = grey.resize((size, size), Image.Resampling.BICUBIC)
    canvas.image.paste(colour, (round((x - side / 2) * SCALE), round((y - side / 2) * SCALE)), ink)


def digit_picture(rng: random.Random, split: str) -> Picture:
    """One handwritten digit, or two beside each other. The digits of a split are in no other."""
    images, targets = handwritten()
    pool = range(len(images))[DIGITS_OF[split]]
    canvas = Canvas(rng)
    canvas.clutter()
    two = rng.random() < 0.4
    chosen = [rng.choice(pool)]
    while two and len(chosen) < 2:
        other = rng.choice(pool)
        chosen += [other] if targets[other] != targets[chosen[0]] else []
    for k, i in enumerate(chosen):
        x = (29 + 54 * k if two else SIZE / 2) + rng.uniform(-5, 5)
        side = rng.uniform(38, 48) if two else rng.uniform(46, 72)
        y = SIZE / 2 + rng.uniform(-18, 18)
        write_digit(canvas, images[i], x, y, side, tinted(rng, any_colour(rng), 20))
    canvas.hide(24)
    names = [NUMBERS[targets[i]] for i in chosen]
    sides = ("left", "right") if two else ("",)
    kind = "digit at" if two else "digit"
    asked = tuple(Question(kind, s, n, others(NUMBERS, n)) for s, n in zip(sides, names, strict=True))
    return Picture("identity", canvas.pixels(), asked)


# --- function


def draw_thing(canvas: Canvas, name: str, x: float, y: float, r: float) -> None:
    """One of THINGS within about r of (x, y), turned a little, in one colour and a dark one."""
    rng = canvas.rng
    main, dark = any_colour(rng), tinted(rng, (70, 65, 65), 25)
    turn, flip = rng.uniform(-0.35, 0.35), rng.choice((-1, 1))
    c, s = math.cos(turn), math.sin(turn)

    def at(*points: Point) -> list[Point]:
        return [(x + r * (flip * u * c - v * s), y + r * (flip * u * s + v * c)) for u, v in points]

    w = 0.16 * r
    if name == "hammer":
        canvas.line(at((0, -0.5), (0, 1)), main, 1.3 * w)
        canvas.polygon(at((-0.6, -0.9), (0.5, -0.9), (0.5, -0.4), (-0.6, -0.4)), dark)
    elif name == "scissors":
        canvas.line(at((-0.4, -1), (0.3, 0.45)), dark, w)
        canvas.line(at((0.4, -1), (-0.3, 0.45)), dark, w)
        for u, v in at((0.4, 0.7), (-0.4, 0.7)):
            canvas.ring(u, v, 0.32 * r, main, 0.7 * w)
    elif name == "key":
        canvas.ring(*at((0, -0.6))[0], 0.4 * r, main, 1.1 * w)
        canvas.line(at((0, -0.2), (0, 1)), main, w)
        canvas.line(at((0, 0.9), (0.4, 0.9)), main, w)
        canvas.line(at((0, 0.55), (0.35, 0.55)), main, w)
    elif name == "umbrella":
        canvas.polygon(at((-1, 0), (-0.75, -0.55), (-0.3, -0.85), (0.3, -0.85), (0.75, -0.55), (1, 0)), main)
        canvas.line(at((0, 0), (0, 0.85), (0.28, 0.95), (0.35, 0.7)), dark, 0.8 * w)
    elif name == "cup":
        canvas.polygon(at((-0.7, -0.6), (0.5, -0.6), (0.35, 0.7), (-0.55, 0.7)), main)
        canvas.ring(*at((0.65, 0))[0], 0.32 * r, main, 0.8 * w)
    elif name == "ladder":
        canvas.line(at((-0.4, -1), (-0.4, 1)), main, w)
        canvas.line(at((0.4, -1), (0.4, 1)), main, w)
        for v in (-0.7, -0.25, 0.2, 0.65):
            canvas.line(at((-0.4, v), (0.4, v)), main, 0.8 * w)
    elif name == "pencil":
        canvas.polygon(at((-0.2, -1), (0.2, -1), (0.2, 0.6), (-0.2, 0.6)), main)
        canvas.polygon(at((-0.2, 0.6), (0.2, 0.6), (0, 1.05)), dark)
    elif name == "clock":
        canvas.ring(*at((0, 0))[0], 0.95 * r, main, w)
        canvas.line(at((0, -0.65), (0, 0), (0.4, 0.2)), dark, 0.8 * w)
    elif name == "lamp":
        canvas.polygon(at((-0.35, -0.9), (0.35, -0.9), (0.75, -0.1), (-0.75, -0.1)), main)
        canvas.line(at((0, -0.1), (0, 0.9)), dark, w)
        canvas.line(at((-0.45, 0.95), (0.45, 0.95)), dark, 1.2 * w)
    elif name == "broom":
        canvas.line(at((0, -1), (0, 0.3)), dark, 0.9 * w)
        canvas.polygon(at((-0.25, 0.25), (0.25, 0.25), (0.6, 1), (-0.6, 1)), main)
    elif name == "spoon":
        canvas.line(at((0, -0.3), (0, 1)), dark, w)
        canvas.disc(*at((0, -0.62))[0], 0.4 * r, dark)
    else:  # glasses
        for u, v in at((-0.5, 0), (0.5, 0)):
            canvas.ring(u, v, 0.42 * r, main, 0.8 * w)
        canvas.line(at((-0.1, -0.08), (0.1, -0.08)), main, 0.7 * w)
        canvas.line(at((-0.9, -0.1), (-1.1, -0.4)), main, 0.7 * w)
        canvas.line(at((0.9, -0.1), (1.1, -0.4)), main, 0.7 * w)


def things_picture(rng: random.Random, split: str) -> Picture:
    """One thing, or two beside each other."""
    canvas = Canvas(rng)
    canvas.clutter()
    two = rng.random() < 0.5
    names = rng.sample(list(THINGS), 2 if two else 1)
    for k, name in enumerate(names):
        x = (30 + 52 * k if two else SIZE / 2) + rng.uniform(-4, 4)
        r = rng.uniform(13, 20) if two else rng.uniform(16, 32)
        draw_thing(canvas, name, x, SIZE / 2 + rng.uniform(-16, 16), r)
    canvas.hide(28)
    sides = ("left", "right") if two else ("",)
    uses = list(THINGS.values())
    asked = tuple(
        Question("use at" if two else "use", side, THINGS[name], others(uses, THINGS[name]))
        for side, name in zip(sides, names, strict=True)
    )
    return Picture("function", canvas.pixels(), asked)


# --- pictures and questions


def others(names: Iterable[str], name: str) -> tuple[str, ...]:
    """The names without one of them: the wrong answers."""
    return tuple(n for n in names if n != name)


PAINTERS: dict[str, Callable[[random.Random, str], Picture]] = {
    "action": lambda rng, split: (pose_picture if rng.random() < 0.75 else motion_picture)(rng, split),
    "attribute": shapes_picture,
    "identity": digit_picture,
    "function": things_picture,
}


def ask(question: Question, rng: random.Random, split: str) -> Item:
    """A wording of the split, and the answer among three wrong options in any order."""
    wording = rng.choice(QUESTIONS[question.kind][split]).format(question.about)
    options = [question.answer, *rng.sample(question.wrong, 3)]
    rng.shuffle(options)
    return Item(wording, tuple(options), options.index(question.answer))


def write_questions(folder: Path, seed: int) -> None:
    """Write val.parquet and test.parquet: as many questions of every category, one a picture.

    Columns: id, subject, image (PNG), question, options, answer. No picture is in the training stock, and no
    handwritten digit and no wording of a split is in another.
    """
    for split, n in COUNTS.items():
        rng = random.Random(f"{split} {seed}")
        rows = [_row(subject, split, k, rng) for subject in SUBJECTS for k in range(1, n + 1)]
        table = pa.Table.from_pylist(rows)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        write_atomically(folder / f"{split}.parquet", buffer.getvalue())


def _row(subject: str, split: str, number: int, rng: random.Random) -> dict[str, object]:
    picture = PAINTERS[subject](rng, split)
    item = ask(rng.choice(picture.questions), rng, split)
    png = io.BytesIO()
    Image.fromarray(picture.pixels).save(png, "PNG", optimize=True)
    return {
        "id": f"{subject}/{split}/{number}",
        "subject": subject,
        "image": png.getvalue(),
        "question": item.question,
        "options": list(item.options),
        "answer": item.answer,
    }
