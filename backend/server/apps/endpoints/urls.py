from django.urls import include, path, re_path
from rest_framework.routers import SimpleRouter

from apps.endpoints import views
from apps.endpoints.models import ENDPOINT_NAME

router = SimpleRouter(trailing_slash=False)
router.register("endpoints", views.EndpointViewSet, basename="endpoint")
router.register("mlalgorithms", views.MLAlgorithmViewSet, basename="mlalgorithm")
router.register("mlalgorithmstatuses", views.MLAlgorithmStatusViewSet, basename="mlalgorithmstatus")
router.register("mlrequests", views.MLRequestViewSet, basename="mlrequest")
router.register("abtests", views.ABTestViewSet, basename="abtest")

urlpatterns = [
    # First, since patterns are tried in their order and this one is asked for most.
    re_path(rf"^(?P<endpoint_name>{ENDPOINT_NAME})/predict\Z", views.PredictView.as_view()),
    path("", include(router.urls)),
    path("stop_ab_test/<int:pk>", views.StopABTestView.as_view()),
    path("batch-predict", views.BatchPredictView.as_view()),
]
