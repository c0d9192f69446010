"""Removal of old checkpoints of a run that cannot know that another one needs them."""

from pathlib import Path

from pretrain.checkpoint import pruning, storage


def test_a_checkpoint_that_cannot_be_marked_as_needed_is_kept_as_the_warning_says(tmp_path: Path) -> None:
    run, said = tmp_path / "run", list[str]()
    for step in (2, 4, 5, 6):
        storage.directory(run, step).mkdir(parents=True)
        (storage.directory(run, step) / storage.MANIFEST).write_text("{}")
        (storage.directory(run, step) / pruning.USED_BY).mkdir()  # so that the file cannot be written
    for step in (2, 5):
        pruning.tell_use(storage.directory(run, step), tmp_path / "other", said.append)
    assert all(
        "cannot know that, and may remove it; checkpoint.keep_every keeps checkpoints there" in one for one in said
    )
    assert len(said) == 2
    pruning.prune(run, 6, keep=1, keep_every=2)
    assert storage.steps(run) == [2, 4, 6]
    pruning.prune(run, 6, keep=1)
    assert storage.steps(run) == [6]
