"""Tests in a real guest under QEMU: no hardware virtualisation, nothing installed, the machine's clock untouched.

`guest.Guest` is what tests use. `build` gathers what it is made of (`cpio` packs it), `machine` is the QEMU process,
`page` the vmclock page and its time line, `truth` the figures; `agent`, `install_wheel` and `sampler.c` run inside.
"""
