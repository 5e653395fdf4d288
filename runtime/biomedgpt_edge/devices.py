"""What a bundle runs on: the processor, or the first NVIDIA GPU by one of three engines."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal, get_args

from .bundle import Bundle
from .decoder.base import Decoder
from .decoder.graph import Choice, choose, decoder_graph
from .decoder.kv_cache import KvElement
from .decoder.onnx import OnnxDecoder
from .device_cache import Verify
from .embedding import Embedder
from .encoders import Encoders
from .errors import OptionError, PlatformError

DeviceName = Literal["cpu", "native", "cuda", "tensorrt"]
DEVICES: tuple[DeviceName, ...] = get_args(DeviceName)
# Of the device "native": "auto" is "cuda" where the installed ONNX Runtime has that provider, and the bundle graphs.
EncodersWanted = Literal["auto", "cpu", "cuda"]
ENCODERS: tuple[EncodersWanted, ...] = get_args(EncodersWanted)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Used:
    """What an engine computes with.

    Attributes:
        embedder: where the decoder wants its prompts; None for this machine's memory.
        context: positions of prompt and answer that it takes, where it takes fewer than the model.
    """

    decoder: Decoder
    encoders: Encoders
    embedder: Embedder | None = None
    context: int | None = None


def require_options(device: str, encoders: str, **only_on_cpu: object) -> None:
    """Refuses a device that there is none of, and options that would be ignored on the one that is asked for.

    Raises:
        OptionError: with the option.
    """
    for name, value, known in (("device", device, DEVICES), ("encoders", encoders, ENCODERS)):
        if value not in known:
            raise OptionError(
                f"{name} is {str(value)[:40]!r}.",
                seen=str(value)[:40],
                limit=", ".join(known),
                remedy=f"Give one of {', '.join(known)}.",
            )
    if encoders != "auto" and device != "native":
        raise OptionError(
            f"encoders is {encoders!r}, and device is {device!r}, whose encoders run where its decoder does.",
            seen=encoders,
            remedy="Leave encoders out, or use the device native.",
        )
    if device == "cpu":
        return
    given = next((name for name, value in only_on_cpu.items() if value not in (None, "auto")), None)
    if given is not None:
        raise OptionError(
            f"{given} is {only_on_cpu[given]!r}, and device is {device!r}, on which it does not apply.",
            seen=str(only_on_cpu[given]),
            remedy=f"Leave {given} out, or use the device cpu.",
        )


def load_cpu(bundle: Bundle, *, threads: int, choice: Choice, verify: Verify, kv_cache: KvElement | None) -> Used:
    """On the processor.

    Raises:
        PlatformError, BundleCorruptError, OptionError: see :class:`OnnxDecoder`.
    """
    graph = decoder_graph(bundle, choice, verify)
    decoder = OnnxDecoder(bundle, threads=threads, graph=graph, kv_cache=kv_cache)
    return Used(decoder, Encoders(bundle, threads=threads, choice=choice, verify=verify))


def load_gpu(
    bundle: Bundle, device: DeviceName, *, threads: int, verify: Verify, encoders: EncodersWanted, allow_16bit: bool
) -> Used:
    """On the GPU. What TensorRT needs and is not there yet is built.

    Raises:
        PlatformError: the machine misses something, or is too small.
        OptionError: the bundle has no graphs for it.
    """
    if device == "native":
        return _load_native(bundle, threads=threads, verify=verify, encoders=encoders, allow_16bit=allow_16bit)
    if device == "cuda":
        from .decoder.onnx_cuda import CudaDecoder
        from .encoders_gpu import CudaEncoders
        from .ort_cuda import require_cuda

        # Before gigabytes are derived for it.
        require_cuda()
        return Used(CudaDecoder(bundle, verify=verify), CudaEncoders(bundle, threads=threads, verify=verify))
    from .decoder.tensorrt import TensorRtDecoder
    from .encoders_gpu import TensorRtEncoders
    from .tensorrt.build import engines_for, find_target, plan_engines
    from .tensorrt.store import stored_context

    target = find_target()
    plan = plan_engines(bundle, target)
    # Whoever built engines for fewer positions wants these.
    context = stored_context(plan.key)
    if context is not None:
        plan = plan_engines(bundle, target, context)
    engines = engines_for(plan, verify, lambda line: _log.info("%s", line))
    reading = TensorRtEncoders(bundle, plan, engines, threads=threads)
    return Used(TensorRtDecoder(bundle, plan, engines), reading, context=plan.context)


def _load_native(bundle: Bundle, *, threads: int, verify: Verify, encoders: EncodersWanted, allow_16bit: bool) -> Used:
    from .decoder.cuda import NativeDecoder, require_gpu
    from .embedding_gpu import GpuEmbedder
    from .encoders_gpu import NativeEncoders
    from .ort_cuda import has_provider, require_cuda

    require_gpu()
    protein = bundle.manifest.protein_encoder
    possible = has_provider() and (protein is None or protein.cuda is not None)
    on_gpu = encoders == "cuda" or (encoders == "auto" and possible)
    if on_gpu:
        try:
            require_cuda()
        except PlatformError as error:
            remedy = f"{error.remedy} Or let the processor read inputs: encoders 'cpu' (--encoders cpu)."
            raise PlatformError(error.message, seen=error.seen, remedy=remedy) from error
    decoder = NativeDecoder(bundle)
    embedder = GpuEmbedder(decoder, allow_16bit=allow_16bit)
    if on_gpu:
        return Used(decoder, NativeEncoders(bundle, decoder, threads=threads, verify=verify), embedder)
    return Used(decoder, Encoders(bundle, threads=threads, choice=choose(bundle), verify=verify), embedder)
