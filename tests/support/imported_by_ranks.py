"""What ranks of the tests import besides training: imported once, in the process that they are forked from."""

import tests.support.gradients
import tests.support.tiny_run  # noqa: F401
