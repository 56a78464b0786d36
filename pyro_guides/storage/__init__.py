"""Safe files: tensors and a description of what they belong to, without pickle."""

from pyro_guides.storage.files import UnreadableFileError as UnreadableFileError
from pyro_guides.storage.objects import decode as decode
from pyro_guides.storage.objects import encode as encode
from pyro_guides.storage.objects import is_writable as is_writable
from pyro_guides.storage.objects import load as load
from pyro_guides.storage.objects import save as save

__all__ = ["UnreadableFileError", "decode", "encode", "is_writable", "load", "save"]
