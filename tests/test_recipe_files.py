"""Recipes from strangers: what grows, runs or never ends is refused."""

from __future__ import annotations

import pytest

from kernelpress.press import RecipeError, load_recipe


def growing(form: str) -> str:
    """Nine names for nine times what the name before stands for."""
    pairs = zip("abcdefgh", "bcdefghi", strict=True)
    return "".join(f"{new}: &{new} {form.format(', '.join([f'*{old}'] * 9))}\n" for old, new in pairs)


class TestRecipes:
    BASE = "model: {name: resnet20}\ntrain: {epochs: 1}\n"

    @pytest.mark.parametrize(
        "text",
        [
            "a: &a [x, x]\n" + growing("[{}]"), "a: &a {x: 1}\n" + growing("{{<<: [{}]}}"),
            "title: &a [*a]",
            "title: &a {b: *a}",
            "title: " + "[" * 5000,
            "title: " + "[" * 30 + "]" * 30,
            "title: !!python/object/apply:os.system ['touch executed']",
            "title: !!python/name:os.system ''",
            "title: !<tag:yaml.org,2002:python/object/new:os.system> [touch executed]",
            "seed: 2001-99-99",
            "seed: " + "1:" * 20_000 + "1",
            "seed: " + "9" * 5000,
            "title: " + "x" * 5000,
            "? [1, 2]\n: 3",
            "title: x\n" * 100_000,
        ],
    )  # fmt: skip
    def test_what_grows_runs_or_never_ends_is_refused(self, tmp_path, monkeypatch, text):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "recipe.yaml").write_text(self.BASE + text)
        with pytest.raises(RecipeError, match=r"recipe\.yaml"):
            load_recipe(tmp_path / "recipe.yaml")
        assert not (tmp_path / "executed").exists()

    def test_aliases_and_merges_still_serve(self, tmp_path):
        (tmp_path / "r.yaml").write_text(
            "model: resnet20\ntrain: &t {epochs: 3, lr: 0.1}\nfinetune: {<<: *t, lr: 0.2}\nmeasure: {peers: [eager]}\n"
        )
        recipe = load_recipe(tmp_path / "r.yaml")
        assert (recipe.finetune.epochs, recipe.finetune.lr) == (3, 0.2)
