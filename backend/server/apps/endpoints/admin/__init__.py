"""The admin pages, registered when this package is imported; its modules follow the groups of their navigation."""

from django.contrib import admin

from apps.endpoints.admin import access, algorithms, batches, experiments, traffic

__all__ = ["access", "algorithms", "batches", "experiments", "traffic"]

admin.site.index_title = "Overview"
admin.site.index_template = "endpoints/admin/overview.html"
