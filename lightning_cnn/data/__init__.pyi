from ._images import PackedImages as PackedImages
from ._loader import Resumable as Resumable
from ._pack import pack as pack
from .dali_folder import DALIFolder as DALIFolder
from .digits import Digits as Digits
from .image_folders import ImageFolders as ImageFolders
from .letters import Letters as Letters
from .packed import PackedDataModule as PackedDataModule
