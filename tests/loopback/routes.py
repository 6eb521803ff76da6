"""Which request the loopback Hub answers with what."""

from tests.loopback import reading, writing

_REPO = r"(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
_GIT = r"/(?:(?P<kind>datasets)/)?(?P<name>[^/]+/[^/]+)\.git"
_REVISION = r"(?P<revision>[^/]+)"
_BRANCH = r"(?P<branch>[^/]+)"

ROUTES = [
    ("GET", r"/api/whoami-v2", writing.whoami),
    ("POST", r"/api/validate-yaml", writing.validate_yaml),
    ("POST", r"/api/repos/create", writing.create),
    ("DELETE", r"/api/repos/delete", writing.delete),
    ("POST", rf"/api/{_REPO}/preupload/{_REVISION}", writing.preupload),
    ("POST", rf"{_GIT}/info/lfs/objects/batch", writing.batch),
    ("POST", rf"{_GIT}/info/lfs/verify", writing.verify),
    ("PUT", r"/blob/(?P<oid>\w+)", writing.store),
    ("POST", rf"/api/{_REPO}/commit/{_REVISION}", writing.commit),
    ("GET", rf"/api/{_REPO}", reading.info),
    ("GET", rf"/api/{_REPO}/revision/{_REVISION}", reading.info),
    ("GET", rf"/api/{_REPO}/refs", reading.refs),
    ("GET", rf"/api/{_REPO}/commits/{_REVISION}", reading.history),
    ("POST", rf"/api/{_REPO}/branch/{_BRANCH}", writing.branch),
    ("DELETE", rf"/api/{_REPO}/branch/{_BRANCH}", writing.delete_branch),
    ("POST", rf"/api/{_REPO}/tag/{_REVISION}", writing.tag),
    ("DELETE", rf"/api/{_REPO}/tag/{_REVISION}", writing.delete_tag),
    ("GET", rf"/api/{_REPO}/discussions", reading.discussions),
    ("POST", rf"/api/{_REPO}/discussions/(?P<number>\d+)/merge", writing.merge),
    ("GET", rf"/api/{_REPO}/tree/{_REVISION}(?:/(?P<path>.*))?", reading.tree),
    ("POST", rf"/api/{_REPO}/paths-info/{_REVISION}", reading.paths_info),
    ("GET", rf"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/{_REVISION}/(?P<path>.+)", reading.resolve),
    ("GET", r"/storage/(?P<oid>\w+)", reading.storage),
]
