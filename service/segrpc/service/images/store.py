"""TEMPORARY"""
from segrpc.service.errors import *
from segrpc.service.images.decode import *
class ImageStore:
    def __init__(self, max_bytes=2**30): self.d={}
    def put(self, data): k=digest_of(data); self.d[k]=data; return k
    def get(self, k):
        if not is_digest(k): raise InvalidFieldError.of("digest","bad")
        if k not in self.d: raise ImageNotFoundError("unknown")
        return self.d[k]
