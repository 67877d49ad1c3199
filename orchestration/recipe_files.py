"""Where recipes lie. Without what it takes to read one: a page of help names them all."""

from pathlib import Path


class RecipeError(Exception):
    """A recipe that cannot run: a sentence with the field's path, its value and the cure, for each problem."""


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path, or a name in a recipes folder (the current one's, then the project's).

    Raises:
        RecipeError: there is none.
    """
    if Path(name).suffix in {".yaml", ".yml"}:
        if not Path(name).is_file():
            raise RecipeError(f"recipe: there is no file {name}; give a path that exists or one of {recipe_names()}")
        return Path(name)
    for folder in _folders():
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    raise RecipeError(f"recipe: there is no recipe {name!r}; take one of {recipe_names()} or a path to a YAML file")


def recipe_names() -> list[str]:
    """The names that load_recipe finds without a path."""
    return sorted({path.stem for folder in _folders() if folder.is_dir() for path in folder.glob("*.yaml")})


def _folders() -> list[Path]:
    package = Path(__file__).parent
    return [Path("recipes"), package.parent / "recipes", package / "recipes"]
