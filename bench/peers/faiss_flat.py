"""faiss's exact index of inner products, IndexFlatIP, in fp32 on the CPU, with as many threads as torch.

An index holds a copy of its keys, so it is made once for them; queries and results are shared, not copied.
"""

import importlib

import torch

NAME = "faiss"
_latest: tuple | None = None  # keys, their version, index


def missing() -> str | None:
    try:
        importlib.import_module("faiss")
    except ImportError as error:
        return f"faiss cannot be imported ({error}): pip install faiss-cpu"
    return None


def topk_search(query, keys, k, *, scale=1.0):
    if keys.dim() == 3 or scale != 1:
        raise NotImplementedError("an index has one set of keys and no scale")
    if query.dtype != torch.float32 or query.device.type != "cpu":
        raise NotImplementedError("it searches in fp32 on the CPU")
    if torch.is_grad_enabled() and (query.requires_grad or keys.requires_grad):
        raise NotImplementedError("faiss computes no gradients")
    flat = query.detach().reshape(-1, query.size(-1)).contiguous()
    scores, indices = _index(keys.detach()).search(flat.numpy(), k)
    shape = (*query.shape[:-1], k)
    return torch.from_numpy(scores).view(shape), torch.from_numpy(indices).view(shape)


def _index(keys):
    global _latest
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    if _latest is None or _latest[0].data_ptr() != keys.data_ptr() or _latest[1] != (keys.shape, keys._version):
        index = faiss.IndexFlatIP(keys.size(1))
        index.add(keys.contiguous().numpy())
        _latest = keys, (keys.shape, keys._version), index
    return _latest[2]
