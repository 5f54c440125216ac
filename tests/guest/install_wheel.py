"""Unpacks a wheel and makes its commands, in a guest that has no pip: python3 install_wheel.py WHEEL."""

import configparser
import os
import sys
import sysconfig
import zipfile

SCRIPT = """\
#!/usr/bin/python3
import sys
from {module} import {function}
sys.exit({function}())
"""
COMMANDS = "/usr/local/bin"


def main(path: str) -> None:
    entries = configparser.ConfigParser()
    with zipfile.ZipFile(path) as wheel:
        wheel.extractall(sysconfig.get_path("purelib"))
        for name in wheel.namelist():
            if name.endswith(".dist-info/entry_points.txt"):
                entries.read_string(wheel.read(name).decode())
    os.makedirs(COMMANDS, exist_ok=True)
    for name, target in entries.items("console_scripts") if "console_scripts" in entries else ():
        module, function = target.split(":")
        script = os.path.join(COMMANDS, name)
        with open(script, "w") as file:
            file.write(SCRIPT.format(module=module, function=function))
        os.chmod(script, 0o755)


if __name__ == "__main__":
    main(sys.argv[1])
