"""What travels to a device: the measuring loop, memory reading, fingerprint and job protocol.

Everything here (and the top of every exporter) keeps to the syntax of Python 3.8, the standard library and numpy.
"""
