"""Settings, from the environment or a `.env` file at the top of the repository; `.env.example` lists them all."""

import sys
from pathlib import Path

import environ
from django.core.exceptions import ImproperlyConfigured
from django.templatetags.static import static
from django.urls import reverse_lazy

from apps.ml.artifacts import default_artifacts_dir
from server import environment as env
from server import logs

BASE_DIR = Path(__file__).resolve().parents[1]
environ.Env.read_env(env.REPOSITORY / ".env")

# --- Who may ask ------------------------------------------------------------------------------------------
# With DEBUG the API is open, and for that reason refuses everyone but this machine (server.middleware).
DEBUG = env.flag("DEBUG", default=True)
DEVELOPMENT_KEY = "development-only-and-refused-without-debug"
SECRET_KEY = env.text("SECRET_KEY", default=DEVELOPMENT_KEY if DEBUG else "")
SHORTEST_KEY = 32
if not DEBUG and (len(SECRET_KEY) < SHORTEST_KEY or SECRET_KEY == DEVELOPMENT_KEY):
    raise ImproperlyConfigured(
        f"SECRET_KEY is required when DEBUG is off, with at least {SHORTEST_KEY} characters. Make one with: "
        "python -c 'import secrets; print(secrets.token_urlsafe(50))'"
    )
# In development Django then answers to localhost and 127.0.0.1 only, which keeps other sites' names out.
ALLOWED_HOSTS = [] if DEBUG else env.words("ALLOWED_HOSTS")
CSRF_TRUSTED_ORIGINS = env.words("CSRF_TRUSTED_ORIGINS")

# --- The product ------------------------------------------------------------------------------------------
ML_ARTIFACTS_DIR = default_artifacts_dir()
ABTEST_POLICY = env.text("ABTEST_POLICY", "accuracy", choices=("accuracy", "evidence"))
SHADOW_TIMEOUT_MS = env.number("SHADOW_TIMEOUT_MS", default=1_000)
PREDICT_DEFAULT_STATUS = env.text("PREDICT_DEFAULT_STATUS", "testing", choices=("testing", "staging", "production"))
MAX_BODY_BYTES = env.number("MAX_BODY_BYTES", default=10 * 2**20)
BATCH_DIR = env.folder_or_url("BATCH_DIR", default=BASE_DIR / "batches")
BATCH_MAX_BYTES = env.number("BATCH_MAX_BYTES", default=10 * 2**30)
BATCH_SYNC_ROWS = env.number("BATCH_SYNC_ROWS", default=20_000, least=0)
BATCH_KEEP_DAYS = env.number("BATCH_KEEP_DAYS", default=7)
BATCH_LEASE_SECONDS = env.number("BATCH_LEASE_SECONDS", default=60)
DASK_SCHEDULER = env.dask("DASK_SCHEDULER")

# --- Django -----------------------------------------------------------------------------------------------
INSTALLED_APPS = [
    "unfold",
    "unfold.contrib.filters",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "whitenoise.runserver_nostatic",
    "django.contrib.staticfiles",
    "rest_framework",
    "knox",
    "django_filters",
    "drf_spectacular",
    "drf_spectacular_sidecar",
    "apps.endpoints",
]
# A prediction like one before passes them all: server.handler says on what they look there.
MIDDLEWARE = [
    "server.middleware.Drained",
    "server.middleware.RequestLog",
    "server.middleware.JsonErrors",
    "server.middleware.LoopbackOnly",
    "server.middleware.HealthChecks",
    "server.middleware.ApiCalls",  # past what follows
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
ROOT_URLCONF = "server.urls"
WSGI_APPLICATION = "server.wsgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"django.contrib.auth.password_validation.{name}"}
    for name in (
        "UserAttributeSimilarityValidator",
        "MinimumLengthValidator",
        "CommonPasswordValidator",
        "NumericPasswordValidator",
    )
]
LANGUAGE_CODE = "en-us"
FORMAT_MODULE_PATH = "server.formats"
LOGIN_REDIRECT_URL = "admin:index"
TIME_ZONE = env.time_zone("TIME_ZONE", default="UTC")
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

# --- Database ---------------------------------------------------------------------------------------------
DATABASES = {"default": env.database("DATABASE_URL", default=BASE_DIR / "db.sqlite3")}
_database = DATABASES["default"]
if _database["ENGINE"] == "django.db.backends.sqlite3":
    _synchronous = env.text("SQLITE_SYNCHRONOUS", "NORMAL", choices=("NORMAL", "FULL", "EXTRA"))
    # Opening the file costs more than a request, and closing it last writes the whole log back: keep it open.
    _database["CONN_MAX_AGE"] = None
    # Immediate transactions queue up for the write lock instead of failing when they need it half-way.
    _database["OPTIONS"] = {
        "timeout": 20,
        "transaction_mode": "IMMEDIATE",
        # A thread of a server or a worker copies the log into the file (checkpoints). Where neither runs, somebody's
        # commit does it at 160 MB.
        "init_command": (
            f"PRAGMA journal_mode=WAL; PRAGMA synchronous={_synchronous}; PRAGMA wal_autocheckpoint=40000;"
        ),
        **_database.get("OPTIONS", {}),
    }
else:
    _database.setdefault("CONN_MAX_AGE", env.number("CONN_MAX_AGE", default=60, least=0))
    _database["CONN_HEALTH_CHECKS"] = True
    if _database["ENGINE"].endswith(".postgresql"):
        # A host that is gone without a word is given up after half a minute; of themselves, systems wait up to hours.
        _options = {"connect_timeout": 10, "tcp_user_timeout": 30_000}
        _options |= {"keepalives_idle": 15, "keepalives_interval": 5, "keepalives_count": 3}
        # PostgreSQL plans the statements of a prediction once per connection. Poolers that hand connections on between
        # transactions cannot keep that; Django's own switch for them is ?DISABLE_SERVER_SIDE_CURSORS=True in the URL.
        if not _database.get("DISABLE_SERVER_SIDE_CURSORS"):
            _options["prepare_threshold"] = sys.maxsize  # so often that only those are prepared which ask for it
        _database["OPTIONS"] = {**_options, **_database.get("OPTIONS", {})}

# --- REST -------------------------------------------------------------------------------------------------
REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": ["apps.endpoints.permissions.TokenAuthentication"],
    "DEFAULT_PERMISSION_CLASSES": ["apps.endpoints.permissions.TokenUnlessDebug"],
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    "DEFAULT_PARSER_CLASSES": [
        "apps.endpoints.parsers.JSONBody",
        "apps.endpoints.parsers.FormBody",
        "apps.endpoints.parsers.MultipartBody",
    ],
    "DEFAULT_FILTER_BACKENDS": ["apps.endpoints.filters.KnownFilters"],
    "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
    "EXCEPTION_HANDLER": "apps.endpoints.exceptions.exception_handler",
    "UNAUTHENTICATED_USER": None,
    "URL_FORMAT_OVERRIDE": None,
    "TEST_REQUEST_DEFAULT_FORMAT": "json",
}
REST_KNOX = {"TOKEN_TTL": None, "AUTH_HEADER_PREFIX": "Token"}
SPECTACULAR_SETTINGS = {
    "TITLE": "Customer Retention Prediction API",
    "DESCRIPTION": "Predict which customers will stay, log every answer, join it to what really happened.",
    "VERSION": "1",
    "SCHEMA_PATH_PREFIX": "/api/v1",
    "SERVE_INCLUDE_SCHEMA": False,
    "COMPONENT_SPLIT_REQUEST": True,
    "SWAGGER_UI_DIST": "SIDECAR",
    "SWAGGER_UI_FAVICON_HREF": "SIDECAR",
    "POSTPROCESSING_HOOKS": [
        "drf_spectacular.hooks.postprocess_schema_enums",
        "apps.endpoints.openapi.describe_errors",
        "apps.endpoints.openapi.describe_customers",
    ],
    "ENUM_NAME_OVERRIDES": {
        "LifecycleStatus": "apps.endpoints.models.Status",
        "Verdict": "apps.endpoints.models.Decision.Verdict",
        "Label": [("1", "1"), ("0", "0")],
        "AnswerStatus": ["OK"],
        "ErrorStatus": ["Error"],
    },
}

# --- Static files and TLS ---------------------------------------------------------------------------------
STATIC_URL = "/static/"
STATIC_ROOT = env.path("STATIC_ROOT", default=BASE_DIR / "staticfiles")
WHITENOISE_USE_FINDERS = DEBUG
WHITENOISE_AUTOREFRESH = DEBUG
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
    "staticfiles": {
        "BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"
        if DEBUG
        else "whitenoise.storage.CompressedManifestStaticFilesStorage"
    },
}
DATA_UPLOAD_MAX_MEMORY_SIZE = MAX_BODY_BYTES
SECURE_SSL_REDIRECT = env.flag("SECURE_SSL_REDIRECT", default=not DEBUG)
SECURE_HSTS_SECONDS = env.number("SECURE_HSTS_SECONDS", default=0 if DEBUG else 365 * 24 * 3600, least=0)
SECURE_HSTS_INCLUDE_SUBDOMAINS = env.flag("SECURE_HSTS_INCLUDE_SUBDOMAINS", default=not DEBUG)
SECURE_HSTS_PRELOAD = env.flag("SECURE_HSTS_PRELOAD", default=not DEBUG)
SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = env.flag("SECURE_COOKIES", default=not DEBUG)
if env.flag("BEHIND_TLS_PROXY", default=False):
    SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")

# --- Logs -------------------------------------------------------------------------------------------------
LOG_LEVEL = env.text("LOG_LEVEL", "INFO", choices=logs.LEVELS)
LOG_FORMAT = env.text("LOG_FORMAT", default="console" if DEBUG else "json", choices=logs.FORMATS)
logs.configure()
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"structured": {"()": logs.formatter, "kind": LOG_FORMAT}},
    "filters": {"failures": {"()": "django.utils.log.CallbackFilter", "callback": lambda record: record.exc_info}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "structured"}},
    "root": {"handlers": ["console"], "level": LOG_LEVEL},
    "loggers": {
        # Django's lines for debugging hold SQL and, of a failure, every variable: customers.
        "django": {"handlers": [], "level": "INFO" if LOG_LEVEL == "DEBUG" else LOG_LEVEL, "propagate": True},
        # Our own line per request replaces these; what an unforeseen failure's traceback says remains.
        "django.server": {"handlers": [], "level": "WARNING", "propagate": True},
        "django.request": {"level": "ERROR", "filters": ["failures"]},
        "django.security.DisallowedHost": {"level": "CRITICAL"},
    },
}


# --- Admin ------------------------------------------------------------------------------------------------
def _page(title: str, icon: str, model: str, app: str = "endpoints") -> dict[str, object]:
    return {
        "title": title,
        "icon": icon,
        "link": reverse_lazy(f"admin:{app}_{model}_changelist"),
        "permission": lambda request: request.user.has_perm(f"{app}.view_{model}"),
    }


UNFOLD = {
    "SITE_TITLE": "Retention",
    "SITE_HEADER": "Customer retention",
    "SITE_SYMBOL": "group",
    "SITE_FAVICONS": [
        {"rel": "icon", "type": "image/svg+xml", "href": lambda request: static("endpoints/favicon.svg")}
    ],
    "SHOW_VIEW_ON_SITE": False,
    "DASHBOARD_CALLBACK": "apps.endpoints.admin.algorithms.overview",
    "SIDEBAR": {
        "navigation": [
            {"items": [{"title": "Overview", "icon": "dashboard", "link": reverse_lazy("admin:index")}]},
            {
                "title": "Models",
                "items": [
                    _page("Endpoints", "api", "endpoint"),
                    _page("Algorithms", "model_training", "mlalgorithm"),
                    _page("Status history", "history", "mlalgorithmstatus"),
                ],
            },
            {
                "title": "Traffic",
                "items": [
                    _page("Requests", "list_alt", "mlrequest"),
                    _page("Batch jobs", "table_view", "batchjob"),
                ],
            },
            {"title": "Experiments", "items": [_page("A/B tests", "science", "abtest")]},
            {
                "title": "Access",
                "items": [
                    _page("Users", "person", "user", "auth"),
                    _page("Groups", "group", "group", "auth"),
                    {
                        "title": "API tokens",
                        "icon": "key",
                        "link": reverse_lazy("admin:knox_authtoken_changelist"),
                        "permission": lambda request: request.user.is_superuser,
                    },
                ],
            },
        ],
    },
}
