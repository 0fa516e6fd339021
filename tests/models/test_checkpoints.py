"""What makes a folder a checkpoint."""

from jobs.run_folder import StoredRun
from models.training.checkpoints import read_receipt, write_receipt


def test_a_receipt_with_any_flipped_bit_is_no_receipt(tmp_path):
    run = StoredRun(str(tmp_path))
    folder = "checkpoints/step-00000010"
    receipt = {"state": {"step": 10, "skips": [[3, 5]]}, "loss": 0.1 + 0.2, "files": {"a": [1, "ff"]}}
    write_receipt(run, folder, receipt)
    assert read_receipt(run, folder) == receipt
    path = tmp_path / folder / "checkpoint.json"
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        # Or nothing was changed: white space, or a digit that a float is too short for.
        assert read_receipt(run, folder) in (None, receipt), content[place - 10 : place + 10]
    path.write_bytes(content[: len(content) // 2])
    assert read_receipt(run, folder) is None
    assert read_receipt(run, "checkpoints/step-00000020") is None
