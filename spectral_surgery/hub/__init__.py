"""The Hugging Face Hub: every SOURCE may be a repository, every result can be pushed.

The only importer of huggingface_hub besides the model cards; it is imported inside functions, since that takes half a
second that local work does not need. The cache, ``HF_TOKEN``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` work as usual.
"""

from spectral_surgery.hub.download import fetch, fetch_foreign, locate, needed, resolve
from spectral_surgery.hub.listing import Listing, RemoteFile, list_files
from spectral_surgery.hub.repository import Repository, remote, to_push
from spectral_surgery.hub.upload import Stored, Uploaded, prepare, read_text, refuse_tokens, store, upload

__all__ = [
    "Listing",
    "RemoteFile",
    "Repository",
    "Stored",
    "Uploaded",
    "fetch",
    "fetch_foreign",
    "list_files",
    "locate",
    "needed",
    "prepare",
    "read_text",
    "refuse_tokens",
    "remote",
    "resolve",
    "store",
    "to_push",
    "upload",
]
