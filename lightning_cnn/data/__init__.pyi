from ._images import PackedImages as PackedImages
from ._loader import Resumable as Resumable
from ._pack import pack as pack
