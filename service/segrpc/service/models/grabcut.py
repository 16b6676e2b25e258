"""GrabCut (Rother, Kolmogorov and Blake, 2004) as a `PromptableModel`: segmentation by colour, without any weights.

The image is stretched to 256 x 256 cells, the grid of the logits. `grabcut_labels` makes a first labelling of the cells
from a prompt; OpenCV's GrabCut then alternates between two mixtures of colours (object, background) and the minimum cut
between them. The logits are the signed distance from the outline, in cells.
"""

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

from segrpc.service.errors import ModelLoadError
from segrpc.service.images.decode import RGBImage
from segrpc.service.models.base import Decoded, DecodeRequest, Embedding, Float32Array, PromptableModel
from segrpc.service.models.grabcut_labels import (
    COARSE,
    MAYBE_BG,
    MAYBE_FG,
    SIDE,
    SURE_BG,
    SURE_FG,
    BoolCells,
    Cells,
    GridPrompt,
    Scene,
    dilate,
    first_labels,
    signed_distance,
)
from segrpc.service.models.registry import register_model
from segrpc.service.schemas import CompressedRLE, ModelDeploymentConfig, ModelMetadata
from segrpc.service.upsampling import runs_above_zero

_CLICK_RADIUS = 2.0  # cells around a click that are as it says: bilinear upsampling reads no others at the click
_FINE_BAND = 5.0  # cells on both sides of the coarse outline that the cut at full resolution decides
_SEED = 0


@register_model("grabcut")
class GrabCut(PromptableModel):
    """GrabCut of OpenCV: needs no weights.

    Of three candidates the first is the smallest reading of the prompt (a part), the last the largest (the whole). A
    single candidate is the largest reading of a box, the middle one of a ``mask_input``, and of points alone the
    best-scored.

    Object clicks lie in the mask and background clicks outside, unless clicks of both kinds are closer than 4 cells
    (4/256 of a side) to each other. With object clicks only what is connected to one of them is kept. A mask leaves the
    box only for an object click. A ``mask_input`` is kept, except along its outline, around clicks that disagree and,
    with object clicks, in parts that none of them is connected to.

    ``scores`` rank candidates and estimate no IoU: the share of the outline along which the colour changes more than
    around it, times the IoU of the mask's bounding box and the given box. Without an outline (nothing, or the whole
    image, is object) the score is 0. The object score is always 0.

    Equal prompts give equal masks, whatever ran before and runs beside: every cut starts from the same random numbers,
    which OpenCV keeps for each thread.

    Model parameters:
        iterations: Rounds of fitting and cutting, at least 1. Default: 5.
    """

    def __init__(self, config: ModelDeploymentConfig) -> None:
        super().__init__(config)
        unknown = config.model_params.keys() - {"iterations"}
        if unknown:
            raise ModelLoadError(
                f"model {config.name!r} does not understand {', '.join(sorted(unknown))}; it takes iterations"
            )
        iterations = config.model_params.get("iterations", 5)
        if type(iterations) is not int or iterations < 1:
            raise ModelLoadError(f"iterations {iterations!r} of model {config.name!r} is no whole number of at least 1")
        self._iterations: int = iterations

    @property
    def metadata(self) -> ModelMetadata:
        """What it is and can do."""
        return ModelMetadata(family="grabcut", input_size=SIDE, mask_size=SIDE, mask_counts=(1, 3), mask_input=True)

    def load_model(self) -> None:
        """Check that this build of OpenCV has it. See `InferenceModel.load_model`."""
        if not hasattr(cv2, "grabCut"):
            raise ModelLoadError(f"OpenCV {cv2.__version__} was built without grabCut; install opencv-python-headless")

    def embed(self, image: RGBImage) -> Embedding:
        """Stretch an image ``[height, width, 3]`` to the grid and measure its changes of colour."""
        pixels = np.asarray(cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA), dtype=np.uint8)
        coarse = np.asarray(cv2.resize(pixels, (COARSE, COARSE), interpolation=cv2.INTER_AREA), dtype=np.uint8)
        down, right = np.gradient(_smooth_lab(pixels), axis=(0, 1))
        gradient = np.sqrt((down**2 + right**2).sum(axis=2))
        scene = Scene(pixels, _smooth_lab(coarse), gradient)
        nbytes = scene.pixels.nbytes + scene.lab.nbytes + scene.gradient.nbytes
        return Embedding(image.shape[1], image.shape[0], scene, nbytes)

    def decode(self, requests: Sequence[DecodeRequest]) -> list[Decoded]:
        """Segment prompts one by one. See `PromptableModel.decode`."""
        return [self._decode(request) for request in requests]

    def _decode(self, request: DecodeRequest) -> Decoded:
        scene: Scene = request.embedding.features
        prompt = GridPrompt.of(request)
        starts = list(first_labels(scene, prompt))
        if request.num_masks == 1 and prompt.mask is not None:
            starts = starts[1:2]
        elif request.num_masks == 1 and prompt.inside is not None:
            starts = starts[2:]
        masks = [_segment(scene, prompt, labels, self._iterations) for labels in starts]
        scores = np.array([_score(scene, prompt, mask) for mask in masks], dtype=np.float32)
        chosen = np.arange(len(masks)) if request.num_masks > 1 else [int(scores.argmax())]
        return Decoded(np.stack([signed_distance(masks[i]) for i in chosen]), scores[chosen], object_score=0.0)

    def to_masks(self, decoded: Decoded, width: int, height: int) -> list[CompressedRLE]:
        """Upsample the logits bilinearly and threshold them strictly above 0."""
        found = (runs_above_zero(logits, height, width) for logits in decoded.logits)
        return [CompressedRLE.from_runs(runs, height, width) for runs in found]


def _smooth_lab(pixels: npt.NDArray[np.uint8]) -> Float32Array:
    lab = cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB).astype(np.float32)
    return np.asarray(cv2.GaussianBlur(lab, (0, 0), 1.0), dtype=np.float32)


def _segment(scene: Scene, prompt: GridPrompt, labels: Cells, iterations: int) -> Cells:
    """Cut a mask out, starting from labels, and make it honour the clicks."""
    near_fg, near_bg = _cells_from(prompt.fg), _cells_from(prompt.bg)
    is_fg = (near_fg <= _CLICK_RADIUS) & (near_fg <= near_bg)
    is_bg = (near_bg <= _CLICK_RADIUS) & (near_bg < near_fg)
    labels[is_fg], labels[is_bg] = SURE_FG, SURE_BG
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
    rows, columns = (np.flatnonzero((labels != SURE_BG).any(axis=axis)) for axis in (1, 0))
    if rows.size:
        # What is background, its surroundings tell: half as far again on each side.
        y, x = (slice(max(0, at[0] - at.size // 2 - 4), at[-1] + at.size // 2 + 5) for at in (rows, columns))
        mask[y, x] = _cut(scene.pixels[y, x], labels[y, x], iterations)
    if prompt.fg.any():
        _, components = cv2.connectedComponents(mask, connectivity=8)
        mask &= np.isin(components, components[is_fg])
    mask[is_fg], mask[is_bg] = 1, 0
    return mask


def _cells_from(clicked: BoolCells) -> Float32Array:
    """Measure how far every cell is from the nearest clicked one, in cells; infinite if there is none."""
    if not clicked.any():
        return np.full((SIDE, SIDE), np.inf, dtype=np.float32)
    distance = cv2.distanceTransform((~clicked).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.asarray(distance, dtype=np.float32)


def _cut(pixels: npt.NDArray[np.uint8], labels: Cells, iterations: int) -> Cells:
    """Cut at half the resolution, then once more, in a band along the outline, at the full one."""
    if (labels & 1).all():  # nothing is said to be background: the rim is the best guess
        rim = np.ones(labels.shape, dtype=np.bool_)
        rim[3:-3, 3:-3] = False
        labels = np.where(rim & (labels == MAYBE_FG), MAYBE_BG, labels)
    height, width = labels.shape
    if min(height, width) < COARSE:
        return _grab_cut(pixels, labels, iterations)
    size = (width // 2, height // 2)
    coarse_pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    coarse_labels = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST)
    coarse = _grab_cut(np.asarray(coarse_pixels, np.uint8), np.asarray(coarse_labels, np.uint8), iterations)
    mask = np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_NEAREST), np.uint8)
    open_to = (np.abs(signed_distance(mask)) < _FINE_BAND) & (labels >= MAYBE_BG)
    decided = np.where(labels >= MAYBE_BG, mask, labels)  # 0 and 1 are the sure labels
    return _grab_cut(pixels, np.where(open_to, mask + MAYBE_BG, decided), 1)


def _grab_cut(pixels: npt.NDArray[np.uint8], labels: Cells, iterations: int) -> Cells:
    mask = labels & SURE_FG
    if mask.all() or not mask.any():  # OpenCV needs a sample of each side
        return mask
    cv2.setRNGSeed(_SEED)  # the mixtures start from a random clustering
    mixtures = np.zeros((1, 65)), np.zeros((1, 65))
    no_rectangle = (0, 0, 0, 0)
    found, _, _ = cv2.grabCut(
        np.ascontiguousarray(pixels), labels.copy(), no_rectangle, *mixtures, iterations, cv2.GC_INIT_WITH_MASK
    )
    return np.asarray(found, dtype=np.uint8) & SURE_FG


def _score(scene: Scene, prompt: GridPrompt, mask: Cells) -> float:
    outline = dilate(mask == 1, 1) & dilate(mask == 0, 1)
    if not outline.any():
        return 0.0
    around = dilate(outline, 4) & ~outline
    visible = float((scene.gradient[outline] > np.median(scene.gradient[around])).mean())
    return visible * _box_fit(mask, prompt.inside)


def _box_fit(mask: Cells, inside: BoolCells | None) -> float:
    """Compute the IoU of the mask's bounding box and the prompt's box; 1 without a box."""
    if inside is None:
        return 1.0
    bounds = np.zeros_like(inside)
    x, y, width, height = cv2.boundingRect(mask)
    bounds[y : y + height, x : x + width] = True
    return float((bounds & inside).sum() / (bounds | inside).sum())
