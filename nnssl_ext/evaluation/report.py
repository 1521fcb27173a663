"""Self-contained HTML pages, under the name by which this layer imports them."""

from nnssl_ext.io.page import Section as Section
from nnssl_ext.io.page import write_page as write_page
