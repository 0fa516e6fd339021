"""Lets the laboratory's "GPU" nodes train: Ray gives their GPUs out, and what would go to a GPU goes to the CPU.

Every Python of the laboratory's machines imports this at its start. Two modules are changed as they are imported: Ray's
answer to which device a worker has, and PyTorch's process groups, which a build without CUDA refuses with NCCL in them.
"""

import importlib.util
import sys


class _Changes:
    """A finder that lets a module be imported as ever and then changes it."""

    def find_spec(self, name, path=None, target=None):
        change = _CHANGES.pop(name, None)
        if change is None:
            return None
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_change(module):
            load(module)
            change(module)

        spec.loader.exec_module = load_and_change
        return spec


def _cpu_for_gpu(module):
    module.CUDATorchDeviceManager.get_devices = lambda self: [module.torch.device("cpu")]


def _gloo_for_nccl(module):
    start = module.init_process_group

    def init_process_group(backend=None, *arguments, **options):
        return start("gloo" if backend and "nccl" in backend else backend, *arguments, **options)

    module.init_process_group = init_process_group


_CHANGES = {
    "ray.air._internal.device_manager.nvidia_gpu": _cpu_for_gpu,
    "torch.distributed.distributed_c10d": _gloo_for_nccl,
}
sys.meta_path.insert(0, _Changes())
