"""SAM 2 as a `PromptableModel`: the computation of ``SAM2ImagePredictor``, without its state.

Each step repeats the reference (``sam2.sam2_image_predictor`` of sam2 1.1) operation for operation, so that in float32
on a CPU logits and masks are bit-identical. What differs: the encoded image is a value instead of the predictor's
state, there is no torchvision, and the object score is kept.

Images are encoded by `FastEncoder` and prompts decoded by `FastDecoder`, which are equal up to rounding, or with
``decoder = "reference"`` by the network of the reference itself, bit for bit.
"""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from sam2.modeling.sam2_base import SAM2Base
from torch.nn import functional

from segrpc.service.errors import EmbeddingMismatchError, ModelLoadError, OutOfMemoryError, Violation
from segrpc.service.images.decode import RGBImage
from segrpc.service.models.base import Decoded, DecodeRequest, Embedding, PromptableModel
from segrpc.service.models.registry import register_model
from segrpc.service.models.sam2 import hub
from segrpc.service.models.sam2.catalog import VARIANTS
from segrpc.service.models.sam2.checkpoint import build_model, identify, read_checkpoint
from segrpc.service.models.sam2.cuda_graphs import BATCHES, GraphedDecoder, GraphedEncoder
from segrpc.service.models.sam2.decoder import FastDecoder
from segrpc.service.models.sam2.decoder_image import FastFeatures
from segrpc.service.models.sam2.decoder_reader import UnsupportedDecoderError
from segrpc.service.models.sam2.encoder import FastEncoder
from segrpc.service.models.sam2.encoder_reader import UnsupportedEncoderError
from segrpc.service.models.sam2.masks import mask_runs
from segrpc.service.schemas import CompressedRLE, FloatType, ModelDeploymentConfig, ModelMetadata, NDArrayFloat

log = logging.getLogger("segrpc.sam2")

_MEAN = (0.485, 0.456, 0.406)  # of ImageNet, as the reference normalises
_STD = (0.229, 0.224, 0.225)
_DTYPES: dict[FloatType, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_PARAMS: dict[str, tuple[type, ...]] = {
    "checkpoint": (str, Path),
    "config": (str,),
    "decoder": (str,),
    "device": (str,),
    "dtype": (str,),
    "encoder": (str,),
    "hub_id": (str,),
    "threads": (int,),
}

_MAX_BATCH = BATCHES[-1]  # prompts in one call of the network: their feature maps take 17 MB each in float32


@dataclass(frozen=True, slots=True)
class _Features:
    """The three feature maps of an encoded image, on the model's device."""

    image_embed: torch.Tensor  # [1, 256, S/16, S/16]
    high_res: tuple[torch.Tensor, torch.Tensor]  # [1, 32, S/4, S/4], [1, 64, S/8, S/8]

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in (self.image_embed, *self.high_res))

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "_Features":
        fine, medium = self.high_res
        return _Features(move(self.image_embed), (move(fine), move(medium)))


@dataclass(frozen=True, slots=True)
class _DecodedOnGPU(Decoded):
    """Candidates whose logits are on the device as well, where masks are made of them."""

    on_device: torch.Tensor


@register_model("sam2", *VARIANTS)
class Sam2(PromptableModel):
    """SAM 2 or SAM 2.1 of any size.

    Model parameters:
        checkpoint: A ``.pt`` file. Default: the published one, if ``segrpc-server pull`` fetched it before.
        hub_id: Another repository of the hub to look for it in.
        config: The name of a configuration in the package ``sam2``. Default: that of the registered name; under the
            name ``sam2`` it is told from the weights.
        decoder: ``fast`` (the default) or ``reference``, which gives the reference's very bits.
        device: ``auto`` (the default: CUDA if there is any), ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``float32`` (the default), ``bfloat16`` or ``float16``: the precision of autocast.
        encoder: ``fast`` or ``reference``. Default: as `decoder`. In float32 on a CPU; else it is the reference's.
            ``int8`` is ``fast`` with products in 8 bits, on such a CPU only: faster, and masks change a little.
        threads: Threads for computing on the CPU; sets them for the whole process. Default: as torch chooses.
    """

    takes_device = True

    _model: SAM2Base
    _fast_encoder: FastEncoder | None = None
    _fast: FastDecoder | None = None
    _graphed: GraphedDecoder | None = None
    _graphed_encoder: GraphedEncoder | None = None
    # Work of the two threads that the service uses runs on streams of their own; None on a CPU.
    _encode_stream: torch.cuda.Stream | None = None
    _decode_stream: torch.cuda.Stream | None = None

    def __init__(self, config: ModelDeploymentConfig) -> None:
        super().__init__(config)
        params = config.model_params
        unknown = params.keys() - _PARAMS.keys()
        if unknown:
            raise ModelLoadError(
                f"model {config.name!r} does not understand {', '.join(sorted(unknown))}; it takes "
                f"{', '.join(sorted(_PARAMS))}"
            )
        for key, kinds in _PARAMS.items():
            if params.get(key) is not None and not isinstance(params[key], kinds):
                raise ModelLoadError(f"{key} {params[key]!r} of model {config.name!r} is no {kinds[0].__name__}")
        if (params.get("threads") or 0) < 0:
            raise ModelLoadError(f"threads {params['threads']} of model {config.name!r} is below 0")
        dtype: FloatType = params.get("dtype") or "float32"
        if dtype not in _DTYPES:
            raise ModelLoadError(f"dtype {dtype!r} is unknown; give float32, bfloat16 or float16")
        self._decoder = params.get("decoder") or "fast"
        self._encoder = params.get("encoder") or self._decoder
        if self._decoder not in ("fast", "reference"):
            raise ModelLoadError(f"decoder {self._decoder!r} is unknown; give fast or reference")
        if self._encoder not in ("fast", "reference", "int8"):
            raise ModelLoadError(f"encoder {self._encoder!r} is unknown; give fast, reference or int8")
        self._dtype = dtype
        self._device = _device(params.get("device") or "auto")
        self._float_on_cpu = self._device.type == "cpu" and dtype == "float32"
        if self._encoder == "int8" and not self._float_on_cpu:
            raise ModelLoadError(f"encoder 'int8' is for float32 on a CPU, not for {dtype} on {self._device}")

    @property
    def metadata(self) -> ModelMetadata:
        """What it is and can do; known once it is loaded."""
        size = self._model.image_size
        return ModelMetadata(
            family="sam2",
            input_size=size,
            mask_size=size // 4,
            mask_counts=(1, 3),
            mask_input=True,
            embeddings=True,
            device=str(self._device),
            compute_dtype=self._dtype,
        )

    def load_model(self) -> None:
        """Read the checkpoint and build the network. See `InferenceModel.load_model`."""
        params = self.config.model_params
        if params.get("threads"):
            torch.set_num_threads(params["threads"])
        file = self._checkpoint()
        state = read_checkpoint(file)
        variant = VARIANTS.get(self.config.registered_name) or identify(state)
        config = params.get("config") or (variant and variant.config)
        if not config:
            raise ModelLoadError(f"checkpoint {str(file)!r} is of no published size: give its config")
        self._model = build_model(state, config, self._device, f"checkpoint {str(file)!r}")
        self._mean = torch.tensor(_MEAN, device=self._device)[:, None, None]
        self._std = torch.tensor(_STD, device=self._device)[:, None, None]
        if self._decoder == "fast":
            try:
                self._fast = FastDecoder(self._model, _DTYPES[self._dtype])
            except UnsupportedDecoderError as error:
                log.warning("model %r is decoded by the reference's network, because %s", self.config.name, error)
        if self._encoder != "reference" and self._float_on_cpu:
            int8 = self._encoder == "int8"
            try:
                self._fast_encoder = FastEncoder(self._model, self._mean, self._std, int8=int8)
            except UnsupportedEncoderError as error:
                if int8:
                    raise ModelLoadError(f"model {self.config.name!r} cannot be encoded in int8: {error}") from error
                log.warning("model %r is encoded by the reference's network, because %s", self.config.name, error)
            else:
                del self._model.image_encoder  # its weights were copied: 0.1 to 0.9 GB
        if self._device.type == "cuda":
            # For each new shape cuDNN's attention makes a plan, which takes 0.1 s and more; the other kernels
            # take about as long to run.
            torch.backends.cuda.enable_cudnn_sdp(False)
            self._encode_stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._decode_stream = torch.cuda.Stream(self._device, priority=-1)  # type: ignore[no-untyped-call]
            torch.cuda.synchronize(self._device)  # the weights came over another stream
        if self._fast and self._encode_stream and self._decode_stream:
            self._graphed = GraphedDecoder(self._fast, self._decode_stream)
            with self._computing(self._encode_stream):
                image = self._preprocess(np.zeros((64, 64, 3), np.uint8))
                self._graphed_encoder = GraphedEncoder(self._maps, image, self._encode_stream)
        self._warm_up()

    def _warm_up(self) -> None:
        """Decode first clicks and refinements, so that nobody waits for what is set up by the first calls.

        On a GPU these are a box as well, second and third refinements, all numbers of prompts that are decoded
        together, and an image: graphs are recorded, and kernels loaded.
        """
        with self._computing(self._decode_stream):
            coarse, fine, medium = (
                torch.zeros(shape, dtype=dtype, device=self._device)
                for shape, dtype in zip(self._map_shapes(), self._map_dtypes(), strict=True)
            )
            embedding = self._embedding(1, 1, (fine, medium, coarse))
        if self.batches:
            embedding = self.embed(np.zeros((64, 64, 3), np.uint8))
        point, label = np.full((1, 2), 0.5, np.float32), np.ones(1, np.int32)
        first = DecodeRequest(embedding, point, label, None, None, 3)
        decoded = self.decode([first])[0]
        refined = replace(first, mask_input=decoded.logits[:1], num_masks=1)
        if not self.batches:
            self.decode([refined])
            return
        box = replace(first, points=point[:0], labels=label[:0], box=np.array([0, 0, 1, 1], np.float32))
        later = [replace(refined, points=point.repeat(n, 0), labels=label.repeat(n)) for n in (2, 3, 4)]
        counts = BATCHES if self._graphed else BATCHES[:1]
        for request, count in itertools.product((first, box, refined, *later), counts):
            self.decode([request] * count)
        self.to_masks(decoded, 1024, 1024)
        torch.cuda.empty_cache()  # of what was needed for recording only

    def _checkpoint(self) -> Path:
        params = self.config.model_params
        if params.get("checkpoint"):
            return Path(params["checkpoint"])
        name = self.config.registered_name
        if name not in VARIANTS:
            raise ModelLoadError(f"model {name!r} needs a checkpoint file")
        found = hub.find(VARIANTS[name], params.get("hub_id") or "")
        if found is None:
            raise ModelLoadError(
                f"model {name!r} needs its weights: fetch them with `segrpc-server pull {name}`, or give a checkpoint"
            )
        return found

    def unload(self) -> None:
        """Free the network and the device's memory."""
        del self._model
        self._fast_encoder = self._fast = self._graphed = self._graphed_encoder = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def device_memory(self) -> int | None:
        """Return what torch has reserved of the GPU, in bytes."""
        return int(torch.cuda.memory_reserved(self._device)) if self._device.type == "cuda" else None

    def embed(self, image: RGBImage) -> Embedding:
        """Encode an image ``[height, width, 3]``; see ``SAM2ImagePredictor.set_image``."""
        with self._computing(self._encode_stream):
            if self._fast_encoder:
                found = self._fast_encoder.encode(torch.from_numpy(image.copy()))
                return self._embedding(image.shape[1], image.shape[0], found)
            pixels = self._preprocess(image)
            maps = self._graphed_encoder.encode(pixels) if self._graphed_encoder else self._maps(pixels)
            return self._embedding(image.shape[1], image.shape[0], maps)

    def _maps(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Run the reference's encoder: the finest map first, each as ``[1, channels, height, width]``."""
        outputs = self._model.forward_image(pixels)
        _, features, _, sizes = self._model._prepare_backbone_features(outputs)
        if self._model.directly_add_no_mem_embed:
            features[-1] = features[-1] + self._model.no_mem_embed
        return [f.permute(1, 2, 0).view(1, -1, *size) for f, size in zip(features, sizes, strict=True)]

    def _preprocess(self, image: RGBImage) -> torch.Tensor:
        size = self._model.image_size
        if self._device.type == "cpu":
            planes = torch.from_numpy(image.transpose(2, 0, 1).copy())
        else:
            planes = torch.from_numpy(image.copy()).to(self._device).permute(2, 0, 1).contiguous()
        resized = functional.interpolate(
            planes.float().div(255)[None], (size, size), mode="bilinear", align_corners=False, antialias=True
        )
        return (resized - self._mean) / self._std

    def _embedding(self, width: int, height: int, maps: Sequence[torch.Tensor]) -> Embedding:
        fine, medium, coarse = maps
        if self._fast:
            fast = self._fast.prepare(coarse, fine, medium)
            return Embedding(width, height, fast, fast.nbytes)
        # In the layout of the reference: another changes the order of summation, and so the last bits.
        features = _Features(coarse, (fine.contiguous(), medium.contiguous()))
        return Embedding(width, height, features, features.nbytes)

    def _map_shapes(self) -> list[tuple[int, int, int, int]]:
        """Return the shapes of the feature maps: the coarse one, the fine one and the medium one."""
        side, decoder = self._model.image_size // 4, self._model.sam_mask_decoder
        shapes = [(1, self._model.hidden_dim, side // 4, side // 4)]
        channels = [decoder.conv_s0.out_channels, decoder.conv_s1.out_channels]
        return shapes + [(1, c, side >> level, side >> level) for level, c in enumerate(channels)]

    def _map_dtypes(self) -> list[torch.dtype]:
        """Return the element types that autocast gives them.

        The finer ones come out of convolutions; the coarse one is a sum, and float32.
        """
        return [torch.float32, _DTYPES[self._dtype], _DTYPES[self._dtype]]

    @property
    def batches(self) -> bool:
        """On a GPU, where one prompt alone leaves most of it idle."""
        return self._device.type == "cuda"

    def decode(self, requests: Sequence[DecodeRequest]) -> list[Decoded]:
        """Decode prompts; see ``SAM2ImagePredictor.predict``.

        On a CPU one by one: batches change logits in the last bits and are no faster. On a GPU those of equal shape
        together; prompts are never padded.
        """
        with self._computing(self._decode_stream):
            if not self.batches:
                return [self._decode([request])[0] for request in requests]
            return self._decode_in_groups(requests)

    def _decode_in_groups(self, requests: Sequence[DecodeRequest]) -> list[Decoded]:
        groups: dict[tuple[int, bool, int], list[int]] = {}
        for i, request in enumerate(requests):
            tokens = len(request.points) + (0 if request.box is None else 2)
            groups.setdefault((tokens, request.mask_input is None, request.num_masks), []).append(i)
        found: dict[int, Decoded] = {}
        for members in groups.values():
            for start in range(0, len(members), _MAX_BATCH):
                batch = members[start : start + _MAX_BATCH]
                found.update(zip(batch, self._decode([requests[i] for i in batch]), strict=True))
        return [found[i] for i in range(len(requests))]

    def _decode(self, requests: Sequence[DecodeRequest]) -> list[Decoded]:
        """Decode requests of equal shape in one call of the network."""
        features = [request.embedding.features for request in requests]
        points, multimask = self._tokens(requests), requests[0].num_masks > 1
        given = [request.mask_input for request in requests if request.mask_input is not None]
        masks = torch.tensor(np.stack(given), device=self._device) if given else None
        if self._fast:
            fast = self._graphed or self._fast
            logits, scores, object_scores = fast.decode(features, points, masks, multimask)
        else:
            logits, scores, object_scores = self._decode_as_reference(features, points, masks, multimask)
        logits = logits.float()
        hosts = [_to_host(one) for one in (logits, scores.float(), object_scores.float())]
        if self._decode_stream:
            self._decode_stream.synchronize()
        on_host = zip(*(one.numpy() for one in hosts), strict=True)
        if self._device.type == "cpu":
            return [Decoded(logits, scores, float(object_score)) for logits, scores, object_score in on_host]
        return [
            _DecodedOnGPU(own, scores, float(object_score), device)
            for (own, scores, object_score), device in zip(on_host, logits, strict=True)
        ]

    def _decode_as_reference(
        self,
        features: Sequence[_Features],
        points: tuple[torch.Tensor, torch.Tensor] | None,
        masks: torch.Tensor | None,
        multimask: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        encoder, decoder = self._model.sam_prompt_encoder, self._model.sam_mask_decoder
        sparse, dense = encoder(points=points, boxes=None, masks=masks)
        logits, scores, _, object_scores = decoder(
            image_embeddings=_stack([f.image_embed for f in features]),
            image_pe=encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
            repeat_image=False,
            high_res_features=[_stack([f.high_res[level] for f in features]) for level in range(2)],
        )
        return logits, scores, object_scores[:, 0]

    def _tokens(self, requests: Sequence[DecodeRequest]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return coordinates ``[b, n, 2]`` in the model's frame and labels ``[b, n]``: the box's corners come first."""
        coordinates, labels, sizes = [], [], []
        for request in requests:
            corners = np.zeros((0, 2), np.float32) if request.box is None else request.box.reshape(2, 2)
            coordinates.append(np.concatenate([corners, request.points]))
            labels.append(np.concatenate([np.array([2, 3][: len(corners)], dtype=np.int32), request.labels]))
            sizes.append((request.embedding.width, request.embedding.height))
        if not labels[0].size:
            return None
        xy = np.stack(coordinates) / np.array(sizes, np.float32)[:, None, :] * np.float32(self._model.image_size)
        return torch.from_numpy(xy).to(self._device), torch.from_numpy(np.stack(labels)).to(self._device)

    def to_masks(self, decoded: Decoded, width: int, height: int) -> list[CompressedRLE]:
        """Upsample the logits (not clamped) and threshold them strictly above 0."""
        return self.to_masks_of_all([decoded], [(width, height)])[0]

    def to_masks_of_all(
        self, decoded: Sequence[Decoded], sizes: Sequence[tuple[int, int]]
    ) -> list[list[CompressedRLE]]:
        """See `PromptableModel.to_masks_of_all`; those of the same size are made together."""
        groups: dict[tuple[int, int], list[int]] = {}
        for i, size in enumerate(sizes):
            groups.setdefault(size, []).append(i)
        found: dict[int, list[CompressedRLE]] = {}
        for (width, height), members in groups.items():
            with self._computing(self._decode_stream):
                logits = torch.cat([self._logits(decoded[i]) for i in members])
                runs = iter(mask_runs(logits, height, width))
            for i in members:
                own = itertools.islice(runs, len(decoded[i].logits))
                found[i] = [CompressedRLE.from_runs(one, height, width) for one in own]
        return [found[i] for i in range(len(decoded))]

    def _logits(self, decoded: Decoded) -> torch.Tensor:
        if isinstance(decoded, _DecodedOnGPU):
            return decoded.on_device
        return torch.from_numpy(decoded.logits).to(self._device)

    def export_embedding(self, embedding: Embedding, dtype: FloatType) -> tuple[NDArrayFloat, list[NDArrayFloat]]:
        """Return ``[1, 256, 64, 64]``, and ``[1, 32, 256, 256]`` with ``[1, 64, 128, 128]``."""
        features: _Features | FastFeatures = embedding.features
        with self._computing(self._decode_stream):
            if self._fast and isinstance(features, FastFeatures):
                maps = self._fast.maps(features)
            else:
                assert isinstance(features, _Features)
                maps = (features.image_embed, *features.high_res)
            coarse, *fine = (NDArrayFloat.from_numpy(tensor.float().cpu().numpy(), dtype) for tensor in maps)
        return coarse, fine

    def offload(self, embedding: Embedding) -> Embedding | None:
        """Copy an embedding on a GPU to pinned memory of the host, which comes back several times faster."""
        if self._device.type != "cuda":
            return None
        return _moved(embedding, lambda tensor: torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor))

    def restore(self, embedding: Embedding) -> Embedding:
        """Bring an embedding back to the GPU."""
        return _moved(embedding, lambda tensor: tensor.to(self._device))

    def import_embedding(
        self, image_embedding: NDArrayFloat, high_resolution_features: list[NDArrayFloat], width: int, height: int
    ) -> Embedding:
        """See `PromptableModel.import_embedding`."""
        given, expected = [image_embedding, *high_resolution_features], self._map_shapes()
        if len(given) != len(expected):
            levels = len(expected) - 1
            raise EmbeddingMismatchError(
                f"model {self.config.name!r} takes {levels} high_resolution_features, not {len(given) - 1}",
                [Violation("high_resolution_features", f"must be {levels} tensors")],
            )
        names = ["image_embedding", "high_resolution_features[0]", "high_resolution_features[1]"]
        wrong = [
            Violation(name, f"has shape {list(tensor.shape)}; model {self.config.name!r} takes {list(shape)}")
            for name, tensor, shape in zip(names, given, expected, strict=True)
            if tensor.shape != shape
        ]
        if wrong:
            raise EmbeddingMismatchError(f"{wrong[0].field} {wrong[0].description}", wrong)
        with self._computing(self._decode_stream):
            coarse, fine, medium = (
                torch.tensor(tensor.to_numpy(), device=self._device).to(dtype)
                for tensor, dtype in zip(given, self._map_dtypes(), strict=True)
            )
            # In the layout that the encoder leaves it in: another changes the order of summation, and so the last bits.
            coarse = coarse.contiguous(memory_format=torch.channels_last)
            return self._embedding(width, height, (fine, medium, coarse))

    @contextmanager
    def _computing(self, stream: torch.cuda.Stream | None) -> Iterator[None]:
        """Enter inference mode, autocast and the stream, which are per thread, and name the device's exhaustion.

        The stream's work is done when it ends: what it made can be used on other streams.
        """
        autocast = torch.autocast(self._device.type, _DTYPES[self._dtype], enabled=self._dtype != "float32")
        try:
            with torch.inference_mode(), autocast, torch.cuda.stream(stream) if stream else nullcontext():
                yield
                if stream is not None:
                    stream.synchronize()
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise OutOfMemoryError(f"{self._device} has no memory left; send smaller or fewer requests") from error


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Copy to the host; from a GPU, into pinned memory, when the stream gets there."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join tensors ``[1, ...]``; a single one keeps its layout, and with it the reference's last bits."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _moved(embedding: Embedding, move: Callable[[torch.Tensor], torch.Tensor]) -> Embedding:
    return replace(embedding, features=embedding.features.moved(move))


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelLoadError(f"device {name!r} is unknown; give auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ModelLoadError(f"device {name!r} is not supported; give auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelLoadError(f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return device
