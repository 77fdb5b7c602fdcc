"""Those who wait are woken once a message is there in full, and at the end."""

import asyncio

from fedhead.server.link.bell import Bell, heard


def test_it_rings_once_nothing_is_under_way():
    async def run():
        bell = Bell(delay=0.05)
        ticket = bell.ticket()
        with bell.delivery():
            with bell.delivery():
                pass
            assert not await heard(ticket, 0.3)  # one is still under way
        assert await heard(ticket, 30)
        assert bell.ticket() is not ticket
        assert not bell.ticket().is_set()

    asyncio.run(run())


def test_a_delivery_that_fails_ends_too():
    async def run():
        bell = Bell(delay=0.01)
        ticket = bell.ticket()
        try:
            with bell.delivery():
                raise OSError
        except OSError:
            pass
        assert await heard(ticket, 30)

    asyncio.run(run())


def test_a_ringing_between_the_ticket_and_the_wait_is_heard():
    async def run():
        bell = Bell(delay=0)
        ticket = bell.ticket()
        with bell.delivery():
            pass
        await asyncio.sleep(0.05)
        assert await heard(ticket, 0)

    asyncio.run(run())


def test_at_the_end_nobody_waits():
    async def run():
        bell = Bell()
        ticket = bell.ticket()
        bell.stop()
        assert bell.stopping
        assert await heard(ticket, 0)
        assert await heard(bell.ticket(), 0)

    asyncio.run(run())
