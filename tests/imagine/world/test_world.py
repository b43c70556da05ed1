"""Tests of the portrait world: pure functions of seeds, exact ground truth, and words that agree with the pixels."""

import functools
import itertools
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from imagine import world
from imagine.world import Contexts, People, attributes, captions, render, render_groups, sample_contexts, sample_people
from imagine.world import vocabulary as words
from imagine.world.body import letter_boxes
from imagine.world.captions import PHRASES, STYLE_PHRASES
from imagine.world.contexts import letter_numbers, letters_text
from imagine.world.group_captions import ORDINALS, PLACES, group_captions
from imagine.world.groups import ARRANGEMENTS, group_contexts, sample_groups
from imagine.world.people import CONTINUOUS, DISCRETE
from imagine.world.seeds import DEMO, HELD_OUT, JUDGE, TRAIN
from imagine.world.tables import Table, join

SEEDS = list(range(40, 64))
PLAIN = {"style": 0, "headwear": 0, "held": 0, "framing": 1, "expression": 0, "light": 0, "clothes": 0, "gaze": 0.0}
STILL = {"yaw": 0.0, "pitch": 0.0, "roll": 0.0, "shift_x": 0.0, "shift_y": 0.0, "zoom": 1.0}


@functools.cache
def some() -> tuple[People, Contexts, world.Renders]:
    people, contexts = sample_people(SEEDS), sample_contexts(SEEDS)
    return people, contexts, render(people, contexts, size=64)


def plain(count: int = 1, **changes: "Tensor | float") -> tuple[People, Contexts]:
    """Return one person `count` times, facing the camera in a plain context with `changes`."""
    people = sample_people([7]).replace(glasses=0, beard=0, hair_style=2).repeat(count)
    contexts = sample_contexts([3]).replace(**PLAIN, **STILL).repeat(count)
    contexts = contexts.replace(letters=torch.zeros(count, 3, dtype=torch.int64))
    return people, contexts.replace(**changes)


def equal(one: Table, two: Table) -> bool:
    return all(torch.equal(getattr(one, f.name), getattr(two, f.name)) for f in fields(one))


def test_a_seed_gives_the_same_row_in_any_batch() -> None:
    for sample in (sample_people, sample_contexts):
        batch = sample([5, 9, 5, 123_456])
        assert equal(batch[[0]], batch[[2]])
        assert not equal(batch[[0]], batch[[1]])
        assert equal(batch[[1]], sample([9]))
        assert equal(batch, sample([5, 9, 5, 123_456]))


def test_identity_and_context_are_independent() -> None:
    assert not {f.name for f in fields(People)} & {f.name for f in fields(Contexts)}
    seeds = range(600)
    people, contexts = sample_people(seeds), sample_contexts(seeds)
    traits = torch.stack([getattr(people, name).float() for name in (*CONTINUOUS, *DISCRETE)])
    scalars = [f.name for f in fields(Contexts) if f.name not in ("letters", "variation")]
    how = torch.stack([getattr(contexts, name).float() for name in scalars])
    between = torch.corrcoef(torch.cat((traits, how)))[: len(traits), len(traits) :]
    assert between.abs().max() < 0.2  # 5 standard errors


def test_every_word_is_drawn() -> None:
    seeds = range(600)
    seen = attributes(sample_people(seeds), sample_contexts(seeds))
    for name, values in {**words.ATTRIBUTES, **words.TRAITS}.items():
        assert {row[name] for row in seen} == set(values), name
    assert {len(row["letters"]) for row in seen} == {0, 1, 2, 3}


def test_angles_are_clearly_turned_or_clearly_not() -> None:
    contexts = sample_contexts(range(600))
    for angle, edge in ((contexts.yaw, 0.2), (contexts.pitch, 0.13), (contexts.roll, 0.12), (contexts.gaze, 0.4)):
        assert ((angle.abs() < 0.75 * edge) | (angle.abs() > 1.5 * edge)).all()


def test_seed_ranges_are_disjoint() -> None:
    for one, two in itertools.combinations((TRAIN, JUDGE, HELD_OUT, DEMO), 2):
        assert max(one.start, two.start) >= min(one.stop, two.stop)


def test_drift_moves_continuous_traits_a_little_and_leaves_the_rest() -> None:
    people = sample_people(range(100))
    moved = world.drift(people, range(100), 0.06)
    steps = torch.stack([getattr(moved, n) - getattr(people, n) for n in CONTINUOUS])
    assert 0.03 < steps.std() < 0.06  # clipping at 0 and 1 reduces it
    assert all(torch.equal(getattr(moved, name), getattr(people, name)) for name in DISCRETE)
    assert equal(moved[[3]], world.drift(people[[3]], [3], 0.06))
    assert equal(world.drift(people, range(100), 0.0), people)


def test_tables_take_repeat_replace_and_join_rows() -> None:
    people = sample_people([1, 2, 3])
    assert equal(join([people[:1], people[1:]]), people)
    assert equal(people[torch.tensor([False, True, False])], people[[1]])
    assert equal(people.repeat(2)[[2, 3]], people[[1, 1]])
    assert people.replace(age=0.5).age.tolist() == [0.5] * 3
    assert len(people.to("cpu")) == 3


def test_a_row_rendered_alone_equals_the_row_in_a_batch() -> None:
    people, contexts, batch = some()
    for i in (0, 17, len(SEEDS) - 1):  # in different chunks
        alone = render(people[[i]], contexts[[i]], size=64)
        for name in ("images", "masks", "boxes", "landmarks"):
            assert torch.allclose(getattr(alone, name)[0], getattr(batch, name)[i], atol=1e-5), name


def test_renders_have_their_shapes_and_ranges() -> None:
    out = some()[2]
    count = len(SEEDS)
    assert [tuple(getattr(out, n).shape) for n in ("images", "masks", "boxes", "landmarks")] == [
        (count, 3, 64, 64), (count, 64, 64), (count, 4), (count, 5, 2),
    ]  # fmt: skip
    for values in (out.images, out.masks):
        assert values.min() >= 0 and values.max() <= 1
    assert (out.images.flatten(1).std(1) > 0.03).all()


def test_boxes_and_landmarks_lie_on_the_person() -> None:
    out = some()[2]
    middle = out.boxes[:, :2] + out.boxes[:, 2:] / 2
    for i, (x, y) in enumerate(middle.long().tolist()):
        assert out.masks[i, y, x] > 0.9
    slack = 0.1 * out.boxes[:, None, 2:]
    low, high = out.boxes[:, None, :2] - slack, out.boxes[:, None, :2] + out.boxes[:, None, 2:] + slack
    assert ((out.landmarks >= low) & (out.landmarks <= high)).all()
    eyes, nose, mouth = out.landmarks[:, :2], out.landmarks[:, 2], out.landmarks[:, 3:]
    assert (eyes[:, 0, 0] < eyes[:, 1, 0]).all() and (mouth[:, 0, 0] < mouth[:, 1, 0]).all()
    assert (eyes[..., 1].mean(1) < nose[:, 1]).all() and (nose[:, 1] < mouth[..., 1].mean(1)).all()


def test_the_mask_covers_what_the_person_changes() -> None:
    """Two people in one context (photo style, soft light) give pictures that differ only inside the masks."""
    one, context = plain()
    other = sample_people([8])
    a, b = render(one, context), render(other, context)
    changed = (a.images - b.images).abs().amax(1) > 0.02
    assert changed.sum() > 500
    assert not (changed & (torch.maximum(a.masks, b.masks) < 0.001)).any()


def test_truth_moves_with_the_head() -> None:
    people, still = plain(2)
    moved = still.replace(shift_x=torch.tensor([0.0, 0.125]), shift_y=torch.tensor([0.0, -0.0625]))
    out = render(people, moved)
    by = torch.tensor([16.0, -8.0])
    assert torch.allclose(out.boxes[1, :2] - out.boxes[0, :2], by, atol=1e-3)
    assert torch.allclose(out.boxes[1, 2:], out.boxes[0, 2:], atol=1e-3)
    assert torch.allclose(out.landmarks[1] - out.landmarks[0], by.expand(5, 2), atol=1e-3)
    assert torch.allclose(out.masks[1, 30:110, 40:100], out.masks[0, 38:118, 24:84], atol=1e-3)


def test_boxes_scale_with_the_picture() -> None:
    people, context = plain()
    assert torch.allclose(render(people, context, size=128).boxes, 2 * render(people, context, size=64).boxes)


def test_turning_moves_the_nose_and_tilting_the_eyes() -> None:
    people, contexts = plain(3, yaw=torch.tensor([-0.5, 0.0, 0.5]))
    points = render(people, contexts, size=64).landmarks
    nose = points[:, 2, 0] - (points[:, 0, 0] + points[:, 1, 0]) / 2
    assert nose[0] < -1 and nose[1].abs() < 0.01 and nose[2] > 1
    contexts = plain(3, pitch=torch.tensor([-0.3, 0.0, 0.3]))[1]
    height = render(people, contexts, size=64).landmarks[:, 2, 1]
    assert height[0] + 1 < height[1] < height[2] - 1
    contexts = plain(3, roll=torch.tensor([-0.3, 0.0, 0.3]))[1]
    eyes = render(people, contexts, size=64).landmarks[:, :2, 1]
    tilt = eyes[:, 1] - eyes[:, 0]  # clockwise: the eye at the right comes lower
    assert tilt[0] < -1 and tilt[1].abs() < 0.01 and tilt[2] > 1


@pytest.mark.parametrize(
    "name",
    ["expression", "light", "scene", "clothes", "clothes_colour", "headwear", "held", "style", "framing"],
)
def test_every_word_of_a_context_changes_the_picture(name: str) -> None:
    count = len(words.ATTRIBUTES[name])
    images = render(*plain(count, **{name: torch.arange(count)}), size=64).images
    for i, j in itertools.combinations(range(count), 2):
        assert ((images[i] - images[j]).abs() > 0.05).sum() > 20, (name, i, j)


@pytest.mark.parametrize("name", ["hair_style", "hair_colour", "eye_colour", "beard", "glasses", "freckles"])
def test_every_discrete_trait_changes_the_picture(name: str) -> None:
    count = len(words.TRAITS[name])
    people, contexts = plain(count, framing=0)
    images = render(people.replace(**{name: torch.arange(count)}), contexts).images
    for i, j in itertools.combinations(range(count), 2):
        assert ((images[i] - images[j]).abs() > 0.03).sum() > 15, (name, i, j)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_every_continuous_trait_changes_the_picture(name: str) -> None:
    people, contexts = plain(2, framing=0)
    hair = 2 if name == "hairline" else 0  # bald, so that hair hides nothing
    images = render(people.replace(hair_style=hair, **{name: torch.tensor([0.1, 0.9])}), contexts).images
    assert ((images[0] - images[1]).abs() > 0.03).sum() > 20


def test_gaze_moves_the_irises() -> None:
    people, contexts = plain(3, gaze=torch.tensor([-1.0, 0.0, 1.0]), framing=0)
    out = render(people, contexts)
    left, top, width, height = out.boxes[0].long().tolist()
    dark = 1 - out.images[:, :, top : top + height // 2, left : left + width].mean(1)
    dark = (dark - dark.amin(0)).clamp(min=0)  # the differences between the three pictures
    places = (dark * torch.arange(width)).sum((1, 2)) / dark.sum((1, 2))
    assert places[0] < places[1] < places[2]


def test_letters_are_drawn_on_the_chest() -> None:
    people, contexts = plain(3, letters=torch.stack([letter_numbers(text) for text in ("", "HI", "HO")]))
    out = render(people, contexts)
    chest = float(out.boxes[0, 1] + out.boxes[0, 3])
    for i, j, least in ((0, 1, 60), (1, 2, 20)):
        rows, columns = ((out.images[i] - out.images[j]).abs().amax(0) > 0.1).nonzero(as_tuple=True)
        assert len(rows) > least
        assert rows.min() > chest
        assert columns.min() > 20 and columns.max() < 108
    assert [letters_text(row) for row in contexts.letters] == ["", "HI", "HO"]


def test_the_letters_are_inside_their_boxes() -> None:
    for framing in (1, 2):  # portrait, half body
        people, contexts = plain(3, framing=framing, shift_x=torch.tensor([0.02, -0.02, 0.0]))
        lettered = contexts.replace(letters=torch.stack([letter_numbers(text) for text in ("O", "MAN", "")]))
        boxes = letter_boxes(lettered, 256)
        ink = (render(people, lettered, 256).images - render(people, contexts, 256).images).abs().amax(1) > 0.1
        for mask, (left, top, width, height) in zip(ink[:2], boxes[:2].tolist(), strict=True):
            rows, columns = (found.float() for found in mask.nonzero(as_tuple=True))
            assert left - 1 < columns.min() < left + 0.12 * width and left + 0.88 * width < columns.max() < left + width
            assert top - 1 < rows.min() < top + 0.25 * height and top + 0.75 * height < rows.max() < top + height + 1
        assert boxes[2, 2] == 0 and not ink[2].any()


def test_letters_are_light_on_dark_cloth_and_dark_on_light() -> None:
    black, white = words.COLOURS.index("black"), words.COLOURS.index("white")
    people, contexts = plain(4, clothes_colour=torch.tensor([black, black, white, white]))
    letters = torch.stack([letter_numbers(text) for text in ("", "MMM", "", "MMM")])
    images = render(people, contexts.replace(letters=letters)).images
    assert (images[1] - images[0]).max() > 0.5 and (images[1] - images[0]).min() > -0.1
    assert (images[3] - images[2]).min() < -0.5 and (images[3] - images[2]).max() < 0.1


@pytest.mark.parametrize(("count", "height", "width"), [(1, 64, 64), (2, 64, 96), (3, 64, 128), (4, 96, 128)])
def test_groups_show_all_people_from_left_to_right(count: int, height: int, width: int) -> None:
    people, contexts, _ = some()
    out = render_groups(people[: 4 * count], contexts[: 4 * count], count, size=64)
    assert out.images.shape == (4, 3, height, width) and out.boxes.shape == (4, count, 4)
    assert out.landmarks.shape == (4, count, 5, 2) and out.masks.shape == (4, count, height, width)
    middle = out.boxes[..., :2] + out.boxes[..., 2:] / 2
    assert (middle[:, 1:, 0] - middle[:, :-1, 0] > 8).all()
    for picture, faces in enumerate(middle.long().tolist()):
        assert all(out.masks[picture, person, y, x] > 0.9 for person, (x, y) in enumerate(faces))


def test_the_masks_of_a_group_share_every_pixel_at_most_once() -> None:
    people, contexts, _ = some()
    out = render_groups(people[:24], contexts[:24], 3, size=64)
    assert out.masks.sum(1).max() <= 1 + 1e-5
    assert (out.masks.flatten(2).sum(2) > 200).all()


def test_heads_in_groups_are_about_as_large_as_in_portraits() -> None:
    people, contexts, _ = some()
    portrait = render(people, contexts.replace(framing=1), size=64).boxes[:, 3].mean()
    for count in (2, 3, 4):
        head = render_groups(people, contexts, count, size=64).boxes[..., 3].mean()
        assert 0.7 < head / portrait < 1.1, count


def test_arrangements_place_people_and_arms() -> None:
    people, contexts = plain(8)
    groups = sample_groups(range(100, 200), 2, 1.5)
    kinds = [groups[(groups.kind == kind).nonzero()[:1, 0]] for kind in range(len(ARRANGEMENTS))]
    beside, behind, arms = (render_groups(people[:2], contexts[:2], 2, 64, groups=one) for one in kinds)
    height = behind.boxes[0, :, 1] + behind.boxes[0, :, 3] / 2
    assert (height[0] - height[1]).abs() > 5 > (beside.boxes[0, 0, 1] - beside.boxes[0, 1, 1]).abs()
    front, back = kinds[1].order[0, 1], kinds[1].order[0, 0]
    assert behind.boxes[0, back, 1] < behind.boxes[0, front, 1]
    # An arm's hand is seen of the person at the left, on the far side of the one at the right.
    middle = int(arms.boxes[0, 1, 0] + arms.boxes[0, 1, 2] / 2)
    assert arms.masks[0, 0, :, middle:].sum() > 5 and beside.masks[0, 0, :, middle:].sum() == 0


def test_groups_may_have_any_width() -> None:
    people, contexts, _ = some()
    out = render_groups(people[:6], contexts[:6], 3, size=64, width=64)
    assert out.images.shape == (2, 3, 64, 64)
    assert ((out.boxes[..., 0] > 0) & (out.boxes[..., 0] + out.boxes[..., 2] < 64)).all()


def test_invalid_arguments_are_refused() -> None:
    people, contexts, _ = some()
    with pytest.raises(ValueError, match="2 people do not match 3 contexts: give one context per person"):
        render(people[:2], contexts[:3])
    with pytest.raises(ValueError, match="5 people do not fit into a picture: choose 1 to 4"):
        render_groups(people[:5], contexts[:5], 5)
    with pytest.raises(ValueError, match="dense, terse or rewritten"):
        captions(people, contexts, "poetic")


def test_camera_noise_is_a_function_of_its_seed_and_leaves_the_picture_in_range() -> None:
    image = some()[2].images[:2]
    before = image.clone()
    noisy = world.camera_noise(image, 3)
    assert torch.equal(noisy, world.camera_noise(image, 3))
    assert not torch.equal(noisy, world.camera_noise(image, 4))
    assert torch.equal(image, before)
    assert noisy.min() >= 0 and noisy.max() <= 1
    assert 0.01 < (noisy - image).abs().mean() < 0.2


@functools.cache
def written(style: str) -> tuple[list[str], list[dict[str, str]]]:
    seeds = range(300)
    people, contexts = sample_people(seeds), sample_contexts(seeds)
    return captions(people, contexts, style, list(seeds)), attributes(people, contexts)


IDENTITY = (
    "skin", "hair", "afro", "mohawk", "bald", "beard", "moustache", "goatee", "stubble", "glasses", "freckles", "brows",
    "young", "old", "jaw", "lips", "ears", "nose", "brown eyes", "blue eyes", "green eyes", "grey eyes", "narrow",
)  # fmt: skip


def test_dense_captions_describe_the_person() -> None:
    texts, facts = written("dense")
    for text, row in zip(texts, facts, strict=True):
        assert " skin" in text
        assert ("bald head" if row["hair_style"] == "bald" else row["hair_colour"]) in text
        assert row["beard"] == "none" or row["beard"] in text
        assert (f"{row['glasses']} glasses" in text) == (row["glasses"] != "none")
    assert sum(" eyes" in text for text in texts) > 100
    assert len(set(texts)) == len(texts)


def test_rewritten_captions_do_not_describe_the_person() -> None:
    texts = written("rewritten")[0]
    for text in texts:
        assert not [word for word in IDENTITY if f" {word} " in f" {text.replace(',', ' ')} "], text
    assert all("a person" in text for text in texts)


def test_terse_captions_are_a_few_words() -> None:
    texts, _ = written("terse")
    assert all("," not in text and '"' not in text and len(text.split()) <= 14 for text in texts)
    mean = {style: sum(len(t.split()) for t in written(style)[0]) / 300 for style in ("dense", "rewritten", "terse")}
    assert mean["terse"] < 8 < mean["rewritten"] < mean["dense"]


@pytest.mark.parametrize("style", ["dense", "rewritten"])
def test_captions_are_true(style: str) -> None:
    """A phrase of one value of an attribute appears only if the picture has this value."""
    texts, facts = written(style)
    said = 0
    for name, phrases in PHRASES.items():
        for value, options in phrases.items():
            for text, row in zip(texts, facts, strict=True):
                parts = text.split(", ")
                if any(option in parts for option in options):
                    said += 1
                    assert row[name] == value, (text, name)
    assert said > 1_000
    for text, row in zip(texts, facts, strict=True):
        assert (f'with the letters "{row["letters"]}"' in text) == bool(row["letters"])
        others = [p for value, options in STYLE_PHRASES.items() if value != row["style"] for p in options]
        assert not any(text.startswith(phrase + " a") for phrase in others)


def test_every_word_has_phrases_and_no_phrase_is_used_twice() -> None:
    for name, phrases in PHRASES.items():
        assert set(phrases) == set(words.ATTRIBUTES[name])
    assert set(STYLE_PHRASES) == set(words.STYLES)
    every = [phrase for phrases in PHRASES.values() for options in phrases.values() for phrase in options]
    assert len(set(every)) == len(every)


def test_captions_are_functions_of_their_seeds() -> None:
    people, contexts, _ = some()
    for style in ("dense", "rewritten", "terse"):
        seeds = list(range(len(SEEDS)))
        texts = captions(people, contexts, style, seeds)
        assert texts == captions(people, contexts, style, seeds)
        assert captions(people[[4]], contexts[[4]], style, 4) == [texts[4]]
        assert texts != captions(people, contexts, style, [seed + 1 for seed in seeds])


@pytest.mark.parametrize("count", [2, 3, 4])
def test_captions_of_groups_are_true_and_name_people_in_the_order_of_their_references(count: int) -> None:
    seeds = range(60 * count)
    people, contexts = sample_people(seeds), sample_contexts(seeds)
    groups = sample_groups(range(60), count, 1.5)
    order = torch.stack([torch.randperm(count, generator=torch.Generator().manual_seed(i)) for i in range(60)])
    facts = attributes(people, group_contexts(contexts, groups))
    texts = group_captions(people, contexts, groups, order, "rewritten", range(60))
    placed = 0
    for picture, text in enumerate(texts):
        persons = text.split(": ", 1)[1].split("; ")
        assert len(persons) == count
        for number, (place, said) in enumerate(zip(order[picture].tolist(), persons, strict=True)):
            row = facts[picture * count + place]
            assert said.startswith(f"the {ORDINALS[number]} person")
            places = [each for each in PLACES[count] if said.split(", ")[0].endswith(f"person {each}")]
            assert places in ([], [PLACES[count][place]])
            placed += len(places)
            for name in ("expression", "yaw", "headwear", "held"):
                wrong = [p for value, options in PHRASES[name].items() if value != row[name] for p in options]
                assert not set(said.split(", ")) & set(wrong), (name, said)
    assert 0.6 < placed / (60 * count) < 0.9
    with pytest.raises(ValueError, match="choose dense or rewritten"):
        group_captions(people, contexts, groups, order, "terse", range(60))


def test_dense_captions_of_groups_describe_each_person() -> None:
    people, contexts, _ = some()
    groups = sample_groups(range(12), 2, 1.5)
    order = torch.tensor([[0, 1], [1, 0]]).repeat(6, 1)
    for text in group_captions(people, contexts, groups, order, "dense", range(12)):
        assert text.count(" skin") == 2 and len(text.split()) < 110, text


def test_people_in_a_group_share_scene_light_and_style() -> None:
    _, contexts, _ = some()
    groups = sample_groups(range(8), 3, 2.0)
    shown = group_contexts(contexts, groups)
    for name in ("scene", "light", "style"):
        assert torch.equal(getattr(shown, name), getattr(contexts, name)[::3].repeat_interleave(3)), name
    assert (shown.held.view(8, 3)[:, :2] == 0).all()
    assert (shown.letters[groups.behind.flatten()] == 0).all() and shown.letters.any()
