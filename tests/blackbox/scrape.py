"""What Prometheus would read."""

import re
import urllib.request
from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families

from tests.server_process import ServerProcess

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]

METRICS = ("--metrics-listen", "0")


class Scrape:
    """All samples of one moment.

    Args:
        server: A server with metrics.
    """

    def __init__(self, server: ServerProcess) -> None:
        (url,) = re.findall(r"metrics are at (http\S+)", server.log_text())
        with urllib.request.urlopen(url, timeout=30) as response:
            text = response.read().decode("utf-8")
        self.types: dict[str, str] = {}
        self.samples: Samples = {}
        for family in text_string_to_metric_families(text):
            self.types[family.name] = family.type
            for sample in family.samples:
                self.samples[sample.name, frozenset(sample.labels.items())] = sample.value

    @property
    def names(self) -> set[str]:
        """The names of all samples."""
        return {name for name, _ in self.samples}

    def value(self, name: str, **labels: str) -> float:
        """A sample's value; 0 if there is none yet."""
        return self.samples.get((name, frozenset(labels.items())), 0.0)


def scrape_until(server: ServerProcess, settled: Callable[[Scrape], bool]) -> Scrape:
    """Ask again until the metrics are as expected: a call is measured after it is answered."""
    scraped: list[Scrape] = []

    def look(_: object) -> bool:
        scraped.append(Scrape(server))
        return settled(scraped[-1])

    server.wait_for(look)
    return scraped[-1]
