"""Bases: loading pretrained models, telling them apart, and the map of sites in them."""

from veneer.bases.catalogue import CATALOGUE, Entry
from veneer.bases.loading import load_pretrained
from veneer.bases.pretrained import Pretrained
from veneer.bases.site import AttentionSite, Site
from veneer.bases.sites import SiteMap

__all__ = ["CATALOGUE", "AttentionSite", "Entry", "Pretrained", "Site", "SiteMap", "load_pretrained"]
