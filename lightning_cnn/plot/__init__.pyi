from .conv_report import conv_report as conv_report
