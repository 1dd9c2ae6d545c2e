from ._loader import Resumable as Resumable
