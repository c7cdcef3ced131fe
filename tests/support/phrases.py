"""Parts of English and German sentences of our own, for corpora made by tests."""

import re


def phrases(text):
    """``[(English, German), ...]`` from lines of ``English = German; English = German``."""
    return [tuple(entry.split(" = ")) for entry in re.split(r"; |\n", text.strip())]


SUBJECTS = phrases("""
The kitchen lamp = Die Küchenlampe; A garden sensor = Ein Gartensensor; My phone = Mein Telefon
Your washing machine = Deine Waschmaschine; The front door = Die Haustür; Nobody = Niemand
Every thermostat = Jedes Thermostat; The old radio = Das alte Radio; This camera = Diese Kamera
The rain gauge = Der Regenmesser; Our neighbour = Unser Nachbar; Grandmother = Großmutter
An electric car = Ein Elektroauto; The doorbell = Die Klingel; Solar power = Sonnenstrom
The vacuum cleaner = Der Staubsauger; A stranger = Ein Fremder; The cellar pump = Die Kellerpumpe
""")
VERBS = phrases("""
reports = meldet; has forgotten = vergaß; needs = braucht; cannot find = findet nicht
will soon replace = ersetzt bald; never shows = zeigt nie; controls = steuert; sells = verkauft
is looking for = sucht; damaged = beschädigte; understands = versteht; buys = kauft
""")
OBJECTS = phrases("""
its battery level = den Ladestand; a new password = ein neues Passwort; fresh bread = frisches Brot
the wireless network = das Funknetz; two spare keys = zwei Ersatzschlüssel; music = Musik
the measured humidity = die gemessene Feuchte; today's weather = das Wetter von heute
an update – version 7 = eine Aktualisierung – Version 7; yellow paint = gelbe Farbe
the hidden switch = den verborgenen Schalter; lost luggage = verlorenes Gepäck; ice = Eis
cheap electricity = billigen Strom; the fuse box = den Sicherungskasten; nothing = nichts
""")
ADVERBS = phrases("""
before midnight = vor Mitternacht; without any warning = ohne jede Warnung; upstairs = oben
in the guest room = im Gästezimmer; since last summer = seit dem letzten Sommer; quickly = schnell
again and again = immer wieder; for three weeks = drei Wochen lang; by accident = aus Versehen
behind the house = hinter dem Haus; every other Tuesday = jeden zweiten Dienstag; here = hier
""")
