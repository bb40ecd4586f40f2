"""Names of models: what a user types becomes a directory, and a directory a name that others can load."""

from pathlib import Path

from f2l_vllm import models


def test_a_model_of_the_hub_keeps_its_id_whatever_folder_it_was_downloaded_to() -> None:
    snapshot = Path("/cache/hub/models--HuggingFaceTB--SmolVLM2-2.2B-Instruct/snapshots/0a1b")
    assert models.loadable_name(snapshot) == "HuggingFaceTB/SmolVLM2-2.2B-Instruct"
    assert models.loadable_name(Path("/cache/models--a--b--c/snapshots/0a1b")) == "a/b--c"


def test_any_other_is_named_by_its_absolute_path() -> None:
    assert Path(models.loadable_name(models.resolve("f2l-tiny")), "config.json").is_file()
    assert models.loadable_name(Path("some/model")) == str(Path.cwd() / "some/model")
    assert models.loadable_name(Path("/models--mine/snapshots/1")) == "/models--mine/snapshots/1"
