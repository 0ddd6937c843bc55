"""The FSC curve of a deposition is what EMDB's schema names: pairs of x and y within an fsc element."""

import xml.etree.ElementTree as tree

import numpy as np

from cryodask.interop.emdb import fsc_xml


def test_fsc_xml_holds_the_curve_without_the_zeroth_shell():
    frequency, correlation = np.array([0.0, 0.1, 0.2]), np.array([1.0, 0.9, 0.143])
    root = tree.fromstring(fsc_xml(frequency, correlation, 'halves "1" & 2'))
    assert root.tag == "fsc"
    assert root.get("title") == 'halves "1" & 2'
    assert [(float(c.findtext("x")), float(c.findtext("y"))) for c in root.iter("coordinate")] == [(0.1, 0.9), (0.2, 0.143)]
