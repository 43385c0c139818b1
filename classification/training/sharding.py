"""TRAIN.FSDP: weights, gradients, moments and EMA in shards, one a rank, and the checkpoints of such a run.

Both are PyTorch's own: `torch.distributed.fsdp.fully_shard`, by which a parameter is a DTensor of which each rank has
some rows, and `torch.distributed.checkpoint`. A sharded checkpoint is the usual file with an empty tensor (on device
`meta`) for each DTensor, and the folder `shards/NAME` beside it, which several checkpoints may share.
"""

import pickle
import shutil
import uuid
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor import empty as empty_dtensor
from torch.nn.modules.batchnorm import _BatchNorm

from common import distributed
from common.errors import UserError, reason
from common.files import rename, sha256
from models.attention import LabelAttention
from models.classifier import Classifier

SHARDS = "shards"
EXACT = (_BatchNorm, Classifier, LabelAttention)  # compute in float32, or have parameters that do


def build_mesh(config, world):
    """The ranks as a mesh of one dimension, over which everything is sharded; None without TRAIN.FSDP.

    Raises:
        UserError: this process was started alone.
    """
    if not config.TRAIN.FSDP:
        return None
    if not dist.is_initialized():
        raise UserError(
            "TRAIN.FSDP True needs a process per GPU; start them with `python -m jobs.launch main.py ...`, torchrun or "
            "srun, or set TRAIN.FSDP False"
        )
    return init_device_mesh(world.device.type, (world.size,))


def shard(model, mesh, *, dtype, gradient_dtype, offload):
    """Shard the parameters of `model` in place; it is then on the device of the mesh.

    A block (`model.blocks()`, else the whole model) is gathered for its forward and its backward pass, in `dtype`.
    What is EXACT is gathered in float32. Gradients are added in `gradient_dtype`.
    offload: shards are in CPU memory.
    """
    model.to(memory_format=torch.contiguous_format)  # fully_shard takes no other
    form = {
        "mesh": mesh,
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy(),
    }
    # Autocast decides what is computed in which precision, as it does without shards.
    low, exact = (
        MixedPrecisionPolicy(param_dtype=kind, reduce_dtype=gradient_dtype, cast_forward_inputs=False)
        for kind in (dtype, torch.float32)
    )
    for module in outermost(model, EXACT):
        fully_shard(module, mp_policy=exact, **form)
    for module in [*blocks(model), model]:
        fully_shard(module, mp_policy=low, **form)


def outermost(module, kinds):
    """The modules of these classes in a module that are in no other of them."""
    if isinstance(module, kinds):
        return [module]
    return [found for child in module.children() for found in outermost(child, kinds)]


def blocks(model):
    """The modules of a backbone that are sharded one at a time."""
    return model.blocks() if hasattr(model, "blocks") else []


def end_forward(model):
    """After a forward pass alone, what a sharded model has gathered would stay, and become outdated."""
    if isinstance(model, FSDPModule):
        model.reshard()


# --------------------------------------------------------------------------------------- tensors
def local(tensors):
    """What this rank has of each tensor: the shard of a DTensor, all of any other."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def like(tensor, target):
    """A whole `tensor` in the layout of a `target` of its shape: of a DTensor the shard of this rank, else its strides.

    Fused optimizers take the moments of a parameter in the order in which they are in memory.
    """
    if isinstance(tensor, DTensor) or tensor.shape != target.shape:
        return tensor
    if not isinstance(target, DTensor):
        return tensor if tensor.stride() == target.stride() else torch.empty_like(target).copy_(tensor)
    mesh, tensor = target.device_mesh, tensor.contiguous()
    rows = -(-len(tensor) // mesh.size())
    own = tensor[mesh.get_local_rank() * rows :][:rows].to(target.to_local().device)
    return DTensor.from_local(own, mesh, target.placements, shape=tensor.shape, stride=tensor.stride())


def multiply(tensors, factor):
    """Multiply tensors of any device in place by the tensor `factor`."""
    for device in {t.device for t in tensors}:
        torch._foreach_mul_([t for t in tensors if t.device == device], factor.to(device))


def total_norm(gradients, world):
    """The norm of all gradients together, a tensor on the device; of a DTensor each rank has a shard."""
    shards = local(g for g in gradients if isinstance(g, DTensor))
    whole = [g for g in gradients if not isinstance(g, DTensor)]
    norms = [torch.nn.utils.get_total_norm(whole)] if whole else []
    if shards:
        squared = torch.nn.utils.get_total_norm(shards).to(world.device) ** 2
        norms.append((distributed.mean_tensor(squared, world) * world.size).sqrt())
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def _map(change, value, path=""):
    """`value`, dictionaries in dictionaries, with change(dotted path, tensor) for each tensor."""
    if isinstance(value, dict):
        return {key: _map(change, inner, f"{path}.{key}" if path else f"{key}") for key, inner in value.items()}
    return change(path, value) if isinstance(value, torch.Tensor) else value


# ------------------------------------------------------------------------------------------ files
def write(state, folder, world):
    """Write the DTensors of `state` to a new folder of `folder`/shards; returns it with empty tensors for them.

    Every rank must call it, and writes its own shards. The folder has its name when it is whole.

    Raises:
        UserError: there is no room, say.
    """
    tensors = {}

    def take(path, tensor):
        if not isinstance(tensor, DTensor):
            return tensor
        tensors[path] = tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    emptied = _map(take, state)
    if not tensors:
        return state
    token = distributed.gather(uuid.uuid4().hex[:8], world)[0]
    name = f"epoch_{state['epoch']}_update_{state['update']}_{token}"
    target = Path(folder) / SHARDS / name
    temporary = target.with_name(f"{name}.tmp")
    try:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(temporary), process_group=world.group)
    except CheckpointException as error:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        first = next(iter(error.failures.values()))[0]
        raise UserError(
            f"{target}: the shards could not be written ({getattr(first, 'strerror', None) or reason(first)}); make "
            "room: earlier checkpoints are intact, and the same command continues from them"
        ) from error
    own = [*temporary.glob(f"__{world.rank}_*"), *([temporary / ".metadata"] if world.is_main else [])]
    files = {}
    for path in own:
        with open(path, "rb") as file:
            files[path.name] = sha256(file)
    files = {name: digest for of_rank in distributed.gather(files, world) for name, digest in of_rank.items()}
    if world.is_main:
        rename(temporary, target)
    return emptied | {"shards": {"folder": name, "files": files}}


def remove_unused(folder):
    """Delete the shards that no checkpoint in the folder of a run names."""
    paths = [*(Path(folder) / SHARDS).glob("*")]
    used = set()
    for path in Path(folder).glob("*.pth") if paths else ():
        try:
            used.add(torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("shards", {}).get("folder"))
        except Exception:  # of a damaged one, which may name any
            return
    for path in paths:
        if path.name not in used:
            shutil.rmtree(path, ignore_errors=True)


class _Unpickler(pickle.Unpickler):
    """Reads the table of the shards, a pickle, without running what else one can hold."""

    ALLOWED = {
        "torch.distributed.checkpoint.metadata": (
            "Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
            "StorageMeta", "_MEM_FORMAT_ENCODING",
        ),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch.serialization": ("_get_layout",),
        "torch": ("Size", "float16", "bfloat16", "float32", "float64", "int64"),
        "pathlib": ("PosixPath",),
        "pathlib._local": ("PosixPath",),
    }  # fmt: skip

    def find_class(self, module, name):
        if name not in self.ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def read(state, path, mesh=None):
    """The content `state` of the checkpoint file `path` with its tensors: whole, or sharded over `mesh`.

    Raises:
        UserError: a shard is missing, or not as it was written.
    """
    folder = Path(path).parent / SHARDS / Path(state["shards"]["folder"]).name
    for name, digest in state["shards"]["files"].items():
        part = folder / Path(name).name
        try:
            with open(part, "rb") as file:
                found = sha256(file)
        except OSError as error:
            raise UserError(
                f"checkpoint {path} is in shards, of which {part} cannot be read ({error.strerror}); keep the folder "
                f"{SHARDS}/{folder.name} beside it, or use another checkpoint"
            ) from error
        if found != digest:
            raise UserError(
                f"checkpoint {path} is in shards, of which {part} is not as it was written (a bad copy or disk); use "
                "another checkpoint"
            )
    tensors = {}

    def empty(key, tensor):
        if not tensor.is_meta:
            return tensor
        part, _, name = key.partition(".")
        stored = f"{state['weights']}.{name}" if part == "model" else key  # of the best EMA, the EMA's
        if stored not in tensors and mesh is None:
            tensors[stored] = torch.empty(tensor.shape, dtype=tensor.dtype)
        elif stored not in tensors:
            tensors[stored] = empty_dtensor(tensor.shape, dtype=tensor.dtype, device_mesh=mesh, placements=[Shard(0)])
        return tensors[stored]

    filled = _map(empty, {key: value for key, value in state.items() if key != "shards"})
    # As dcp.load, but each rank for itself, and with an unpickler of ours.
    with open(folder / ".metadata", "rb") as file:
        table = _Unpickler(file).load()
    reader, planner = dcp.FileSystemReader(folder), dcp.DefaultLoadPlanner()
    planner.set_up_planner(tensors, table, is_coordinator=True)
    reader.set_up_storage_reader(table, is_coordinator=True)
    reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()
    return filled
