"""What makes a folder a checkpoint."""

import torch

from jobs.run_folder import StoredRun
from models.training.checkpoints import load, read_receipt, save, write_receipt


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


def test_a_checkpoint_brings_the_optimizers_state_and_leaves_its_settings(tmp_path):
    run = StoredRun(str(tmp_path))

    def made(**settings):
        model = torch.nn.Linear(2, 2)
        return model, torch.optim.AdamW(model.parameters(), **settings)

    model, optimizer = made(weight_decay=0.1, betas=(0.9, 0.95))
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    save(run, "checkpoints/step-00000001", model, optimizer, {})
    other, newer = made(weight_decay=0.3, betas=(0.8, 0.9))
    assert load(run, "checkpoints/step-00000001", other, newer) is not None
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(newer.state[other.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
    assert (newer.param_groups[0]["weight_decay"], newer.param_groups[0]["betas"]) == (0.3, (0.8, 0.9))
