"""The page at `/`: files of our own, which are the whole of it."""

from fastapi import APIRouter

page = APIRouter(include_in_schema=False)
