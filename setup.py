"""The one compiled module and the tag of the wheel it makes; all else is in pyproject.toml.

setuptools reads both from pyproject.toml too, but calls that experimental.
"""

import sysconfig

from setuptools import Extension, setup

HISTOGRAM = Extension(
    "portcall.calibration._histogram",
    ["portcall/calibration/_histogram.c"],
    extra_compile_args=["-std=c11", "-O3"],
    py_limited_api=True,
    optional=True,  # without a C compiler NumPy counts, slower
)

if sysconfig.get_config_var("Py_GIL_DISABLED"):
    setup()  # free-threaded Pythons have no stable ABI; NumPy counts
else:
    # One wheel for every Python from requires-python on; _histogram.c asks for the same version.
    setup(ext_modules=[HISTOGRAM], options={"bdist_wheel": {"py_limited_api": "cp311"}})
