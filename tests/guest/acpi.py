"""An ACPI table that turns QEMU's event for a restored machine into one of the vmclock device."""

from __future__ import annotations

import struct


def notifying_table() -> bytes:
    """The table, which takes the place of the one of QEMU's vmgenid device.

    QEMU raises GPE 5 for that device on every restore. The table holds no more than its handler:
    Scope (\\_GPE) { Method (_E05) { Notify (\\_SB.VCLK, 0x80) } }.
    """
    notify = b"\x86" + b"\\\x2e_SB_VCLK" + b"\x0a\x80"
    method = b"_E05\x00" + notify
    method = b"\x14" + bytes([len(method) + 1]) + method
    scope = b"\\_GPE" + method
    scope = b"\x10" + bytes([len(scope) + 1]) + scope
    # In the kernel's eyes it is the same table, since signature, OEM and OEM table id are, in a higher revision.
    oem, table_id, revision = b"BOCHS ", b"VMGENID\0", 2
    header = struct.pack("<4sIBB6s8sI4sI", b"SSDT", 36 + len(scope), 1, 0, oem, table_id, revision, b"TEST", 1)
    table = bytearray(header + scope)
    table[9] = -sum(table) & 0xFF
    return bytes(table)
