"""Behaviour of aerial_nb.data.splits: no scene on two sides, the same draw everywhere."""

import logging

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from aerial_nb.data.raster import DataError
from aerial_nb.data.splits import SPLITS, ensure_split, split_by_scene, split_hash

SIZES = st.lists(st.integers(1, 9), min_size=3, max_size=40)
SEED = st.integers(0, 10_000)


def table(sizes):
    "A samples table with scenes of these sizes."
    scenes = [f"scene{i}" for i, n in enumerate(sizes) for _ in range(n)]
    return pd.DataFrame(
        {
            "image": [f"data/tiles/{i}.tif" for i in range(len(scenes))],
            "label": "",
            "scene": scenes,
            "split": "",
            "gsd_m": 1.0,
        }
    )


@given(SIZES, SEED)
def test_no_scene_crosses_and_no_image_is_lost(sizes, seed):
    samples = table(sizes)
    out = split_by_scene(samples, seed=seed)
    assert (out.groupby("scene")["split"].nunique() == 1).all()
    assert set(out["split"]) == set(SPLITS)  # none of the three is empty
    assert out["image"].tolist() == samples["image"].tolist() and (samples["split"] == "").all()


@given(SIZES, SEED, st.randoms())
def test_order_of_rows_does_not_matter(sizes, seed, random):
    samples = table(sizes)
    order = list(range(len(samples)))
    random.shuffle(order)
    mixed = split_by_scene(samples.iloc[order], seed=seed).sort_index()
    assert mixed["split"].tolist() == split_by_scene(samples, seed=seed)["split"].tolist()


@given(st.lists(st.integers(1, 3), min_size=20, max_size=60), SEED)
def test_shares_are_met_where_scenes_are_small(sizes, seed):
    got = split_by_scene(table(sizes), (0.5, 0.25, 0.25), seed)["split"].value_counts(normalize=True)
    assert (got - pd.Series({"train": 0.5, "valid": 0.25, "test": 0.25})).abs().max() < 0.08


def test_the_same_on_every_machine():
    "Known answers: a change here makes every published split hash void."
    out = split_by_scene(table([1] * 10), seed=0)
    assert "".join(s[1] for s in out["split"]) == "rrrarreera"
    assert split_hash(out) == "32e4f4e4f8660e42"


def test_seeds_differ():
    draws = {tuple(split_by_scene(table([4, 1, 3, 1, 2, 6, 1, 2]), seed=s)["split"]) for s in range(20)}
    assert len(draws) > 8


def test_a_zero_share_gets_nothing():
    assert set(split_by_scene(table([1] * 5), (0.8, 0.2, 0))["split"]) == {"train", "valid"}


@pytest.mark.parametrize("sizes", [[5], [3, 2]])
def test_too_few_scenes(sizes):
    with pytest.raises(
        DataError, match=f"{len(sizes)} scenes? cannot be divided into train, valid, test: touching"
    ):
        split_by_scene(table(sizes))


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.6, 0.6, -0.2), (0.5, 0.2, 0.2), (np.nan, 0.5, 0.5)])
def test_impossible_fractions(fractions):
    with pytest.raises(DataError, match="add up to 1"):
        split_by_scene(table([1] * 9), fractions)


def test_a_scene_too_large_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        split_by_scene(table([50, 1, 1, 1]))
    assert "the largest holds 50 of 53 images" in caplog.text


def test_ensure_split_keeps_and_draws():
    samples = table([1] * 10)
    official = samples.assign(split=["test"] * 4 + ["train"] * 6)
    assert ensure_split(official)["split"].tolist() == official["split"].tolist()
    for blank in ("", None, np.nan):
        assert ensure_split(samples.assign(split=blank), seed=3).equals(split_by_scene(samples, seed=3))
    for split in (["train"] * 9 + [""], ["val"] * 10):
        with pytest.raises(DataError, match="in no split or in an unknown one"):
            ensure_split(samples.assign(split=split))


@given(SIZES, SEED, st.sampled_from(["/data/", "C:\\work\\", "", "../x/y/"]))
def test_hash_names_the_split_and_not_the_place(sizes, seed, prefix):
    out = split_by_scene(table(sizes), seed=seed)
    moved = out.assign(image=prefix + out["image"]).sample(frac=1, random_state=seed)
    assert split_hash(moved) == split_hash(out)
    other = out.copy()
    other.loc[0, "split"] = "test" if out["split"][0] != "test" else "train"
    assert split_hash(other) != split_hash(out)
    assert split_hash(out.iloc[1:]) != split_hash(out)
    assume(len(out) > 1)
    assert split_hash(out.assign(scene=out["scene"] + "x")) != split_hash(out)
