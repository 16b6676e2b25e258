"""Graphs on a GPU: they give what the decoder gives, to each thread its own; what cannot be recorded goes without."""

import threading
from collections.abc import Iterator

import pytest
import torch

from segrpc.service.models.sam2 import cuda_graphs
from segrpc.service.models.sam2.cuda_graphs import GraphedDecoder, GraphedEncoder
from segrpc.service.models.sam2.decoder import FastDecoder
from tests.unit.models.test_sam2_decoder import Case, case, small_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def stream() -> Iterator[torch.cuda.Stream]:
    """A stream to work on, as the service has one for decoding."""
    made = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.inference_mode(), torch.cuda.stream(made):
        yield made


@pytest.fixture
def decoder() -> FastDecoder:
    model = small_model()
    model.sam_prompt_encoder.cuda()
    model.sam_mask_decoder.cuda()
    return FastDecoder(model, torch.float32)


def ask(decoder: FastDecoder | GraphedDecoder, cases: list[Case], multimask: bool) -> tuple[torch.Tensor, ...]:
    prepare = decoder.prepare if isinstance(decoder, FastDecoder) else decoder._decoder.prepare
    features = [prepare(*(one.cuda() for one in each.maps)) for each in cases]
    given = [each.points for each in cases if each.points is not None]
    masks = [each.mask for each in cases if each.mask is not None]
    points = (torch.cat([xy for xy, _ in given]).cuda(), torch.cat([labels for _, labels in given]).cuda())
    return decoder.decode(features, points if given else None, torch.cat(masks).cuda() if masks else None, multimask)


@pytest.mark.parametrize("multimask", [True, False], ids=["three", "single"])
@pytest.mark.parametrize("mask", [True, False], ids=["refined", "first"])
@pytest.mark.parametrize(("batch", "num_points"), [(1, 1), (2, 3), (3, 2), (1, 40), (5, 1), (17, 1)])
def test_graphs_decode_as_the_decoder(
    decoder: FastDecoder, stream: torch.cuda.Stream, batch: int, num_points: int, mask: bool, multimask: bool
) -> None:
    graphed = GraphedDecoder(decoder, stream)
    kept = []
    for round_ in range(3):
        cases = [case(10 * round_ + i, num_points, mask=mask) for i in range(batch)]
        kept.append((ask(graphed, cases, multimask), ask(decoder, cases, multimask)))
    # Compared at the end: a later replay must not overwrite what an earlier one gave.
    for ours, theirs in kept:
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_small_batch_after_a_large_one(decoder: FastDecoder, stream: torch.cuda.Stream) -> None:
    """What the large one left where graphs read is no part of the answer."""
    graphed = GraphedDecoder(decoder, stream)
    for round_, batch in enumerate((8, 3, 5, 4, 1)):
        cases = [case(10 * round_ + i, 2, mask=True) for i in range(batch)]
        ours, theirs = ask(graphed, cases, False), ask(decoder, cases, False)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_only_so_many_graphs_are_kept(
    decoder: FastDecoder, stream: torch.cuda.Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "_MAX_GRAPHS", 2)
    graphed = GraphedDecoder(decoder, stream)
    for num_points in (1, 2, 3, 1):
        one = [case(num_points, num_points, mask=False)]
        torch.testing.assert_close(ask(graphed, one, True), ask(decoder, one, True), rtol=1e-5, atol=1e-5)
    assert len(graphed._graphs) == 2


@pytest.mark.parametrize("same", [True, False], ids=["same stream", "another stream"])
def test_threads_get_their_own_answers(decoder: FastDecoder, stream: torch.cuda.Stream, same: bool) -> None:
    graphed = GraphedDecoder(decoder, stream)
    cases = [[case(seed, 2, mask=False)] for seed in range(4)]
    expected = [ask(decoder, one, True) for one in cases]
    wrong: list[int] = []

    def work(i: int) -> None:
        own = stream if same else torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.inference_mode(), torch.cuda.stream(own):
            for _ in range(10):
                found = ask(graphed, cases[i], True)
                own.synchronize()
                if not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected[i], strict=True)):
                    wrong.append(i)

    stream.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Synchronizing(FastDecoder):
    """Cannot be recorded: it waits for the device."""

    def decode(self, *args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        found = super().decode(*args, **kwargs)  # type: ignore[arg-type]
        torch.cuda.current_stream().synchronize()
        return found


def test_what_cannot_be_recorded_is_decoded_without_graphs(decoder: FastDecoder, stream: torch.cuda.Stream) -> None:
    model = small_model()
    model.sam_prompt_encoder.cuda()
    model.sam_mask_decoder.cuda()
    graphed = GraphedDecoder(Synchronizing(model, torch.float32), stream)
    for seed in range(2):
        one = [case(seed, 2, mask=False)]
        torch.testing.assert_close(ask(graphed, one, True), ask(decoder, one, True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_encoder_gives_maps_of_their_own(stream: torch.cuda.Stream, dtype: torch.dtype) -> None:
    """Also after autocast ended and began again: what it keeps of the weights is not what a graph reads."""
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.GELU(), torch.nn.Conv2d(8, 4, 3)).cuda()
    images = [torch.rand(1, 3, 32, 32).cuda() for _ in range(4)]

    def encode(image: torch.Tensor) -> list[torch.Tensor]:
        return [network[0](image), network(image)]

    def cast() -> torch.autocast:
        return torch.autocast("cuda", dtype, enabled=dtype != torch.float32)

    with cast():
        encode(images[0])
        graphed = GraphedEncoder(encode, images[0], stream)
    found = []
    for image in images:
        with cast():
            found.append(graphed.encode(image))
        torch.full((64, 1024), float("nan"), device="cuda")  # takes memory that might have been freed
    other = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    other.wait_stream(stream)
    with torch.cuda.stream(other), cast():
        aside = graphed.encode(images[1])
        other.synchronize()
    with cast():
        for image, maps in zip([*images, images[1]], [*found, aside], strict=True):
            for one, expected in zip(maps, encode(image), strict=True):
                torch.testing.assert_close(one, expected)
