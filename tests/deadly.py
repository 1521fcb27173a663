"""A case that takes its worker with it; by itself, so that the next worker of many has little to import."""

import os
import time


def deadly(number):
    if number == 3:
        time.sleep(1)  # Dask's nanny gives a worker up for ever that dies before it has said that it lives
        os._exit(9)
    return number
