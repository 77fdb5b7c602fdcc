"""`fedhead keys DIR`: what a deployment proves itself with, made once and never overwritten.

    ca.key, ca.crt            an authority of this federation's own (EC P-256)
    server.key, server.crt    the server's TLS key and certificate (EC P-256), signed by it
    NAME.key, NAME.pub        one pair a data holder (EC P-384, OpenSSH), as Flower's node authentication takes it

Private files have mode 0600 in a folder of mode 0700, public ones 0644.

    making.py          makes what is missing, and refuses what doesn't fit
    certificates.py    the authority's certificate and the server's
    pairs.py           names of the files, and how each key is read and written
    files.py           the folder: files written once, whole or not at all
    report.py          what lies in a folder, as a dict and as a page
"""

from fedhead.server.keys.making import DEFAULT_HOSTS, LONGEST_DAYS, make_keys
from fedhead.server.keys.report import describe_keys, show_keys

__all__ = ["DEFAULT_HOSTS", "LONGEST_DAYS", "describe_keys", "make_keys", "show_keys"]
