"""Messages of clients, as bytes: what is told by their conversion. The first byte chooses the kind."""

from google.protobuf.message import DecodeError, Message

from segrpc.service.engine.base import ServedModel
from segrpc.service.errors import InvalidFieldError
from segrpc.service.identity.principal import ANONYMOUS
from segrpc.service.images.upload import Upload
from segrpc.service.rpc import convert, refine_convert
from segrpc.service.schemas import ModelMetadata
from segrpc.service.sessions.edits import Malformed, Prompts, Redo, Reset, Scene, SelectMask, Undo
from segrpc.v1.refine_pb2 import RefineRequest
from segrpc.v1.segmentation_service_pb2 import EncodeImageRequest, SegmentRequest
from tests.fuzz.refusals import check_refusal, refusals

MODEL = ServedModel("model", ModelMetadata(mask_size=4, mask_counts=(1, 3), mask_input=True, embeddings=True))
SCENE = Scene(width=100, height=80, model=MODEL.name, metadata=MODEL.metadata, max_points=8)
KINDS: tuple[type[Message], ...] = (SegmentRequest, RefineRequest, EncodeImageRequest)


def run(data: bytes) -> None:
    """Convert one message."""
    if not data:
        return
    try:
        request = KINDS[data[0] % len(KINDS)].FromString(data[1:])
    except DecodeError:
        return  # the boundary says so
    with refusals(request):
        if isinstance(request, SegmentRequest):
            _segment(request)
        elif isinstance(request, EncodeImageRequest):
            convert.find_model([MODEL], ANONYMOUS, request.model, "model")
            convert.check_name("request_id", request.request_id)
            convert.tensor_dtype(request.tensor_dtype, "tensor_dtype")
        elif isinstance(request, RefineRequest):
            _refine(request)


def _segment(request: SegmentRequest) -> None:
    with refusals(request):  # a wrong model must not hide what comes behind it
        convert.find_model([MODEL], ANONYMOUS, request.model, "model")
        convert.check_name("session_id", request.session_id)
        convert.tensor_dtype(request.output.tensor_dtype, "output.tensor_dtype")
    convert.check_prompt_limits(request, 64, 64)
    given = convert.segmentation_input(request, b"image")
    assert given.num_prompts == len(request.prompts)
    outside = list(given.violations_in(SCENE.width, SCENE.height))
    if outside:
        raise convert.in_request_terms(InvalidFieldError.of_all(outside))


def _refine(request: RefineRequest) -> None:
    match request.WhichOneof("payload"):
        case "config":
            with refusals(request):
                refine_convert.refine_options(request.config, MODEL.name, MODEL.metadata)
            try:
                Upload(request.config.upload.size, request.config.upload.digest, 1000, 100)
            except InvalidFieldError as error:
                check_refusal(refine_convert.upload_terms(error), request)
        case "edit":
            edit = refine_convert.edit(request)  # never raises
            if isinstance(edit.action, Malformed):
                check_refusal(edit.action.error, request)
            elif not isinstance(edit.action, Undo | Redo | Reset | SelectMask):
                # Twice, because the second time the names of the points are taken.
                Prompts().edited(edit.action, SCENE).edited(edit.action, SCENE)
