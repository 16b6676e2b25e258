"""TEMPORARY"""
from dataclasses import dataclass
from pathlib import Path
from segrpc.service.errors import *
from segrpc.service.images.decode import *
@dataclass(frozen=True)
class SourcePolicy:
    media_roots: tuple = ()
    allowed_hosts: tuple = ()
    allow_private_addresses: bool = False
    timeout: float = 10.0
    max_redirects: int = 3
def read_source(s, p=None, l=None): return s
def read_uri(u, p, l):
    if ":" not in u: raise InvalidFieldError.of("uri","no scheme")
    raise UriNotAllowedError("no")
