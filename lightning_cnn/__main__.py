"""`python -m lightning_cnn VERB ...` is `lightning-cnn VERB ...`."""

import sys

from lightning_cnn.app.main import main

sys.exit(main())
