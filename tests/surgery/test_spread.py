"""Weights spread over devices: FSDP2 works, everything else is refused with its reason.

Legend: B batch, S sequence.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from crossways import reroute
from crossways.surgery.find import UnknownRoutingError


def as_spread(weight, names, ndim=1):
    """What distributed tensors have, and nothing else here looks at."""
    weight.device_mesh = SimpleNamespace(ndim=ndim, mesh_dim_names=names)


@pytest.mark.parametrize("names", [("tp",), ("ep",), ("fsdp", "tp")])
def test_tensor_and_expert_parallelism_are_refused(make, names):
    model = make("olmoe")
    as_spread(model.model.layers[1].mlp.experts.down_proj, names, len(names))
    with pytest.raises(UnknownRoutingError, match=r"layers\.1\.mlp.*tensor or expert parallel"):
        reroute(model, "usmoe")


def test_experts_that_are_a_part_of_all_are_refused(make):
    model = make("olmoe")
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(UnknownRoutingError, match="tensor or expert parallel"):
        reroute(model, "usmoe")


def test_weights_spread_by_something_unknown_are_refused(make):
    model = make("olmoe")
    as_spread(model.model.layers[1].mlp.gate.weight, None)
    with pytest.raises(UnknownRoutingError, match="not by fully_shard"):
        reroute(model, "usmoe")


def test_flattened_weights_are_refused(tmp_path):
    """FSDP of the first kind, in a group of one process."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model = FullyShardedDataParallel(_build(), device_id=torch.device("cpu"))
        with pytest.raises(UnknownRoutingError, match="FullyShardedDataParallel"):
            reroute(model, "usmoe")
    finally:
        dist.destroy_process_group()


def test_data_parallel_replicas_are_no_models(make):
    """`torch.nn.DataParallel` replicas share hooks, which would tell them of one another's passes."""
    wrapped = torch.nn.DataParallel(make("olmoe"))
    with pytest.raises(UnknownRoutingError, match="DataParallel"):
        reroute(wrapped, "usmoe")


def _batch(rank):
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(3, 64, (2, 9), generator=generator)


def _build():
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 2}
    return OlmoeForCausalLM(OlmoeConfig(**sizes, **heads, pad_token_id=0, initializer_range=0.3))


def _shard(model):
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def _train(rank, folder, order):
    """Two steps of a rerouted and sharded model on a batch of this process' own; what it said and learnt is saved."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = _build()
    if order == "shard first":
        handle = reroute(_shard(model), "usmoe", k=1.5)
    else:
        handle = reroute(model, "usmoe", k=1.5)
        _shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(2):
        ids = _batch(2 * step + rank)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    loads = [load_E.tolist() for load_E in handle.loads()]
    with torch.no_grad():
        handle.set_estimates([{"cutoff": [0.2]}] * 2)
        said = model.generate(_batch(7), max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    whole = ((name, p.full_tensor() if hasattr(p, "full_tensor") else p) for name, p in model.named_parameters())
    weights = {name: weight.detach().clone() for name, weight in whole}
    handle.undo()
    with torch.no_grad():
        plain = model(input_ids=_batch(8)).logits
    torch.save((losses, loads, said, weights, plain), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _by_itself():
    """The same in one process, with the mean of both processes' gradients."""
    model = _build()
    handle = reroute(model, "usmoe", k=1.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, loads = [[], []], [[], []]
    for step in range(2):
        for rank in range(2):
            ids = _batch(2 * step + rank)
            loss = model(input_ids=ids, labels=ids).loss
            (loss / 2).backward()
            losses[rank].append(loss.detach())
            loads[rank] = [load_E.tolist() for load_E in handle.loads()]
        optimizer.step()
        optimizer.zero_grad()
    handle.set_estimates([{"cutoff": [0.2]}] * 2)
    with torch.no_grad():
        said = model.generate(_batch(7), max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
        handle.undo()
        plain = model(input_ids=_batch(8)).logits
    return losses, loads, said, dict(model.named_parameters()), plain


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32" or not dist.is_available(), reason="needs gloo")
@pytest.mark.parametrize("order", ["reroute first", "shard first"])
def test_fully_sharded_models_are_rerouted_as_whole_ones(tmp_path, order):
    mp.spawn(_train, args=(str(tmp_path), order), nprocs=2)
    losses, loads, said, weights, plain = _by_itself()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found[0], losses[rank], rtol=1e-4, atol=1e-5)
        assert found[1] == loads[rank]
        assert torch.equal(found[2], said)
        for name, weight in weights.items():
            torch.testing.assert_close(found[3][name], weight.detach(), rtol=1e-3, atol=1e-5, msg=name)
        torch.testing.assert_close(found[4], plain, rtol=1e-3, atol=1e-4)
