"""The words of the little world: prompts that describe a scene, instructions that change one, and what is neither."""

from random import Random

from scripts.demo.scenes import COLOURS, DIRECTIONS, PLACES, SHAPES, SIZES, Scene

Said = dict[str, str]
"""The attributes that a prompt names; what it leaves out is "none"."""

SHAPE_WORDS = {"circle": ("circle", "circle", "disc", "ball"), "square": ("square", "square", "box"),
               "cross": ("cross", "cross", "plus")}  # fmt: skip
SIZE_WORDS = {"small": ("small", "small", "tiny", "little"), "medium": ("medium",),
              "large": ("large", "large", "big", "huge")}  # fmt: skip


def corner_words(place: str) -> tuple[str, ...]:
    upper = place.replace("top", "upper").replace("bottom", "lower")
    return f"at the {place}", f"in the {place} corner", f"in the {upper} corner"


PLACE_WORDS = {
    "center": ("in the center", "in the middle", "in the centre"),
    "left": ("on the left", "at the left", "on the left side"),
    "right": ("on the right", "at the right", "on the right side"),
    "top": ("at the top", "on top", "in the upper part"),
    "bottom": ("at the bottom", "in the lower part"),
    **{place: corner_words(place) for place in PLACES if " " in place},
}
MOVING = ("moving", "moves", "sliding", "going", "flying", "that moves")
DIRECTION_WORDS = {
    "left": ("left", "to the left", "from right to left"), "right": ("right", "to the right", "from left to right"),
    "up": ("up", "upwards", "to the top"), "down": ("down", "downwards", "to the bottom"),
}  # fmt: skip
OPENINGS = ("", "", "", "", "a picture of ", "an image of ", "a drawing of ", "a photo of ", "draw ", "a video of ")
STRANGE = (
    "cat", "dog", "house", "tree", "mountain", "sunset", "portrait", "woman", "man", "city", "car", "forest", "sea",
    "robot", "castle", "dragon", "bird", "flower", "river", "in", "with", "and", "of", "at", "night", "photorealistic",
    "4k", "detailed", "cinematic", "street", "sky", "eating", "running", "old", "beautiful", "style", "oil", "painting",
)  # fmt: skip


def describe(scene: Scene, random: Random, whole: bool = False) -> tuple[str, Said]:
    """A prompt for the scene, and what it names. `whole`: shape, colour, size and background are all named."""
    said: Said = {"shape": scene.shape}
    words = []
    if whole or scene.size != "medium" or random.random() < 0.3:
        words.append(random.choice(SIZE_WORDS[scene.size]))
        said["size"] = scene.size
    if whole or random.random() < 0.97:
        words.append(scene.colour)
        said["colour"] = scene.colour
    words.append(random.choice(SHAPE_WORDS.get(scene.shape, (scene.shape,))))
    thing = with_article(" ".join(words), random)
    parts = []
    if scene.place != "center" or random.random() < 0.15:
        parts.append(random.choice(PLACE_WORDS[scene.place]))
        said["place"] = scene.place
    if scene.direction != "none":
        parts.append(f"{random.choice(MOVING)} {random.choice(DIRECTION_WORDS[scene.direction])}")
        said["direction"] = scene.direction
    background = None
    if whole or scene.background != "white" or random.random() < 0.5:
        background = random.choice(
            (f"{scene.background} background", f"{scene.background} background", scene.background)
        )
        said["background"] = scene.background
    random.shuffle(parts)
    text = join(thing, parts, background, random)
    text = random.choice(OPENINGS) + text + random.choice(("", "", "", "."))
    return recase(text, random), said


def join(thing: str, parts: list[str], background: str | None, random: Random) -> str:
    if background is None:
        return " ".join([thing, *parts])
    if not background.endswith("background"):
        return " ".join([thing, *parts, "on", background])
    match random.randrange(5):
        case 0:
            return ", ".join([thing, *parts, background])
        case 1:
            return f"{with_article(background, random)} with {' '.join([thing, *parts])}"
        case 2:
            return " ".join([thing, f"on {with_article(background, random)}", *parts])
        case _:
            return " ".join([thing, *parts, f"on {with_article(background, random)}"])


def with_article(words: str, random: Random) -> str:
    if random.random() < 0.15:
        return words
    return ("an " if words[0] in "aeiou" else "a ") + words


def recase(text: str, random: Random) -> str:
    chance = random.random()
    return (
        text if chance < 0.6 else text.capitalize() if chance < 0.9 else text.title() if chance < 0.95 else text.upper()
    )


def strange(random: Random) -> str:
    """A prompt about something else: it names nothing of this world."""
    return recase(" ".join(random.choices(STRANGE, k=random.randint(0, 10))), random)


def instruct(before: Scene, name: str, value: str, random: Random) -> str:
    """Words that ask for the scene with this attribute changed."""
    word = random.choice(SHAPE_WORDS.get(before.shape, (before.shape,)))
    thing = random.choice((f"the {word}", f"the {word}", "it", "the shape"))
    return recase(instruction(name, value, thing, random), random)


def instruction(name: str, value: str, thing: str, random: Random) -> str:
    if name == "colour":
        return random.choice((f"make {thing} {value}", f"turn {thing} {value}", f"change {thing} to {value}",
                              f"change the color of {thing} to {value}", f"paint {thing} {value}"))  # fmt: skip
    if name == "background":
        return random.choice((f"make the background {value}", f"change the background to {value}",
                              f"put {thing} on a {value} background", f"turn the background {value}"))  # fmt: skip
    if name == "shape":
        word = random.choice(SHAPE_WORDS.get(value, (value,)))
        return random.choice(
            (f"turn {thing} into a {word}", f"replace {thing} with a {word}", f"make {thing} a {word}")
        )
    if name == "size":
        words = ("bigger", "larger", "large", "big") if value == "large" else ("smaller", "small", "tiny")
        return random.choice((f"make {thing} {random.choice(words)}", f"make {thing} {words[0]}"))
    where = {"center": "to the center", "top": "to the top", "bottom": "to the bottom"}.get(value, f"to the {value}")
    return random.choice((f"move {thing} {where}", f"put {thing} {random.choice(PLACE_WORDS[value])}"))


def vocabulary() -> list[str]:
    """Every word of the prompts, in lower case, in the order of the alphabet."""
    texts = [*SHAPES, *COLOURS, *SIZES, *PLACES, *DIRECTIONS, *MOVING, *OPENINGS]
    for table in (SHAPE_WORDS, SIZE_WORDS, PLACE_WORDS, DIRECTION_WORDS):
        texts += [word for words in table.values() for word in words]
    texts += [
        "a an the it shape on with background make turn change color colour of to paint put into replace move",
        "bigger larger smaller in at and",
    ]
    return sorted({word for text in texts for word in text.lower().split()})
